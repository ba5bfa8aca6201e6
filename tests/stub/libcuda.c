// A stand-in for NVIDIA's libcuda.so.1 on a machine without a GPU: the functions that Triton's driver and launcher call.
// Each call is checked against the rules of the CUDA driver API; a breach is refused with CUDA's error code and a message.
// Device memory is the host's. Kernels are not run: a callback gets each launch, with its parameters as bytes.
#include "cuda.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC 0x70616d5f62757473ull  // marks live objects of the stub
enum { MOST_PARAMETERS = 256, MOST_BYTES = 1 << 14 };

typedef struct Module {
  uint64_t magic;
  int device, sm, exact;
  unsigned char *data;
  size_t size;
} Module;

typedef struct Function {
  uint64_t magic;
  Module *module;
  char name[128];
  int registers, local_bytes, static_shared, threads, required_threads, max_dynamic, non_portable;
  int parameters, parameter_bytes;
  unsigned sizes[MOST_PARAMETERS];
} Function;

typedef struct Stream { uint64_t magic; int device; } Stream;

// Parameters lie behind one another without gaps; a result other than 0 becomes the launch's error.
typedef int (*LaunchCallback)(void *function, const unsigned *grid, unsigned threads, unsigned shared,
                              const unsigned char *parameters, unsigned bytes);

// Read and set by library.py.
typedef struct Stub {
  int devices, driver_version, capability[8];
  long launches, maps, loads, unloads, attributes, pointer_queries, context_switches, refusals;
  char messages[1 << 16];
  size_t used;
} Stub;
static Stub stub = {0, 13000, {0}};
static LaunchCallback callback;
static __thread int current = -1;  // the device of the calling thread's context

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list list;
  va_start(list, format);
  stub.refusals++;
  if (stub.used + 1024 < sizeof(stub.messages)) {
    stub.used += vsnprintf(stub.messages + stub.used, 1000, format, list);
    stub.messages[stub.used++] = '\n';
    stub.messages[stub.used] = 0;
  }
  va_end(list);
  return code;
}
#define REFUSE(...) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__)

Stub *stub_state(void) { return &stub; }
void stub_on_launch(LaunchCallback given) { callback = given; }
void *stub_stream(int device) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->magic = MAGIC, stream->device = device;
  return stream;
}
int stub_parameters(Function *function, unsigned *sizes) {
  for (int i = 0; i < function->parameters; i++) sizes[i] = function->sizes[i];
  return function->parameters;
}

static int capability(void) { return current < 0 ? 0 : stub.capability[current]; }

static int shared_optin(int capability) {
  switch (capability) {
  case 80: case 87: return 166912;
  case 86: case 89: case 120: case 121: return 101376;
  case 90: case 100: case 103: return 232448;
  default: return 65536;
  }
}

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = stub.driver_version; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = stub.devices; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= stub.devices)
    return refuse(CUDA_ERROR_INVALID_DEVICE, "cuDeviceGet: ordinal %d of %d devices", ordinal, stub.devices);
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= stub.devices) return refuse(CUDA_ERROR_INVALID_DEVICE, "attribute of device %d", device);
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = stub.capability[device] / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = stub.capability[device] % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_optin(stub.capability[device]); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_optin(stub.capability[device]) + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = stub.capability[device] >= 90 ? 132 : 108; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1755000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: REFUSE("cuDeviceGetAttribute: attribute %d is not known to the stub", (int)attribute);
  }
  return CUDA_SUCCESS;
}

// Contexts: the primary one of each device, numbered from 1.
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (device < 0 || device >= stub.devices) return refuse(CUDA_ERROR_INVALID_DEVICE, "context of device %d", device);
  *context = (CUcontext)(intptr_t)(device + 1);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)(intptr_t)(current + 1); return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
  current = (int)(intptr_t)context - 1;
  stub.context_switches++;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  if (current < 0) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
  case CUDA_ERROR_INVALID_CONTEXT: *text = "invalid device context"; break;
  case CUDA_ERROR_INVALID_HANDLE: *text = "invalid resource handle"; break;
  case CUDA_ERROR_NO_BINARY_FOR_GPU: *text = "no kernel image is available for execution on the device"; break;
  case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: *text = "too many resources requested for launch"; break;
  case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
  default: *text = "stub error";
  }
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  stub.pointer_queries++;
  if (current < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuPointerGetAttribute without a context");
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) REFUSE("cuPointerGetAttribute: attribute %d", (int)attribute);
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// Cubins: ELF files, whose .nv.info sections say what a kernel takes.
static uint64_t word(const unsigned char *at, int bytes) { uint64_t x = 0; memcpy(&x, at, bytes); return x; }
static int section(Module *m, const char *wanted, const unsigned char **data, uint64_t *size) {
  const unsigned char *d = m->data, *headers = d + word(d + 0x28, 8);
  int count = word(d + 0x3c, 2), names = word(d + 0x3e, 2);
  const char *strings = (const char *)d + word(headers + 64 * names + 24, 8);
  for (int i = 0; i < count; i++) {
    const unsigned char *h = headers + 64 * i;
    if (strcmp(strings + word(h, 4), wanted)) continue;
    *data = d + word(h + 24, 8), *size = word(h + 32, 8);
    return 1;
  }
  return 0;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const unsigned char *d = image;
  if (current < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuModuleLoadData without a context");
  if (memcmp(d, "\177ELF", 4)) return refuse(CUDA_ERROR_INVALID_IMAGE, "cuModuleLoadData: not a cubin");
  uint64_t size = word(d + 0x28, 8) + 64 * word(d + 0x3c, 2), flags = word(d + 0x30, 4);
  Module *m = calloc(1, sizeof *m);
  m->magic = MAGIC, m->device = current, m->size = size, m->data = malloc(size);
  memcpy(m->data, d, size);
  int is_new = d[8] >= 8;  // the ABI version says where the architecture stands
  m->sm = is_new ? flags >> 8 & 0xff : flags & 0xff;
  m->exact = m->sm >= 90;  // Triton compiles for sm_90a and the like, whose code runs nowhere else
  int fits = m->sm / 10 == capability() / 10 && m->sm <= capability() && (!m->exact || m->sm == capability());
  if (!fits) return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "cubin of sm_%d on sm_%d", m->sm, capability());
  stub.loads++;
  *module = (CUmodule)m;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  ((Module *)module)->magic = 0;
  stub.unloads++;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Module *m = (Module *)module;
  char wanted[256];
  const unsigned char *data;
  uint64_t size;
  Function *f = calloc(1, sizeof *f);
  f->magic = MAGIC, f->module = m, f->threads = 1024;
  snprintf(f->name, sizeof f->name, "%s", name);
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  if (!section(m, wanted, &data, &size)) return refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in the module", name);
  for (uint64_t at = 0; at < size;) {
    int format = data[at], kind = data[at + 1], value = word(data + at + 2, 2);
    const unsigned char *p = data + at + 4;
    at += 4;
    if (format == 3 && kind == 0x19) f->parameter_bytes = value;
    if (format != 4) continue;
    at += value;
    if (kind == 0x17) {  // a parameter
      int ordinal = word(p + 4, 2);
      if (ordinal >= MOST_PARAMETERS) REFUSE("%s: more than %d parameters", name, MOST_PARAMETERS);
      f->sizes[ordinal] = word(p + 8, 4) >> 18;
      if (ordinal >= f->parameters) f->parameters = ordinal + 1;
    }
    if (kind == 0x10) f->required_threads = word(p, 4) * word(p + 4, 4) * word(p + 8, 4);
    if (kind == 0x05) f->threads = word(p, 4) * word(p + 4, 4) * word(p + 8, 4);
  }
  if (f->required_threads) f->threads = f->required_threads;
  if (section(m, ".nv.info", &data, &size))
    for (uint64_t at = 0; at < size;) {
      int format = data[at], kind = data[at + 1], value = word(data + at + 2, 2);
      if (format == 4 && kind == 0x2f) f->registers = word(data + at + 8, 4);
      if (format == 4 && kind == 0x11) f->local_bytes = word(data + at + 8, 4);
      at += format == 4 ? 4 + value : 4;
    }
  snprintf(wanted, sizeof wanted, ".nv.shared.%s", name);
  if (section(m, wanted, &data, &size) && m->sm < 90) f->static_shared = size;  // sm_90's is the system's own 1 KiB
  f->max_dynamic = 49152 - f->static_shared;
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  Function *f = (Function *)function;
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = f->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = f->local_bytes; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = f->threads; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = f->static_shared; break;
  default: REFUSE("cuFuncGetAttribute: attribute %d", (int)attribute);
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *f = (Function *)function;
  stub.attributes++;
  if ((int)attribute == 17) return CUDA_ERROR_INVALID_VALUE;  // oversized shared memory: no such device
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) { f->non_portable = value; return CUDA_SUCCESS; }
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) REFUSE("cuFuncSetAttribute: %d", (int)attribute);
  if (value < 0 || value + f->static_shared > shared_optin(capability()))
    REFUSE("%s: %d bytes of dynamic shared memory, the device has %d", f->name, value, shared_optin(capability()));
  f->max_dynamic = value;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// Tensor maps, in the layout of ptx_emulator/tensor_map.py; the last 8 bytes are the mark.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned types_of_ptx[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  unsigned char *out = (unsigned char *)map;
  stub.maps++;
  if (current < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "tensor map without a context");
  if (capability() < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor map on sm_%d", capability());
  if ((uintptr_t)map % 64) REFUSE("tensor map: written to %p, not a multiple of 64 bytes", (void *)map);
  if ((int)type < 0 || (int)type > 12) REFUSE("tensor map: element type %d", (int)type);
  if (rank < 1 || rank > 5) REFUSE("tensor map: rank %u", rank);
  if (!address || (uintptr_t)address % 16) REFUSE("tensor map: address %p is not a multiple of 16 bytes", address);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) REFUSE("tensor map: interleave %d", (int)interleave);
  if ((int)swizzle < 0 || (int)swizzle > 6) REFUSE("tensor map: swizzle %d", (int)swizzle);
  int is_float = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float) REFUSE("tensor map: NaN fill of integers");
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) REFUSE("tensor map: size %llu of axis %u", (unsigned long long)dims[i], i);
    if (box[i] < 1 || box[i] > 256) REFUSE("tensor map: box of %u on axis %u", box[i], i);
    if (steps[i] < 1 || steps[i] > 8) REFUSE("tensor map: element stride %u on axis %u", steps[i], i);
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >= 1ull << 40)
      REFUSE("tensor map: stride %llu of axis %u", (unsigned long long)strides[i], i + 1);
  unsigned inner = box[0] * sizes[type], atom = swizzle >= 4 ? 128 : 16u << swizzle;
  if (inner % 16) REFUSE("tensor map: inner box of %u bytes is not a multiple of 16", inner);
  if (swizzle && inner > atom) REFUSE("tensor map: inner box of %u bytes, swizzle of %u", inner, atom);
  memset(out, 0, 128);
  memcpy(out, &address, 8);
  unsigned fields[] = {rank - 1, types_of_ptx[type], swizzle, interleave, fill};
  memcpy(out + 8, fields, sizeof fields);
  for (unsigned i = 0; i < rank; i++) {
    unsigned size = dims[i];
    memcpy(out + 28 + 4 * i, box + i, 4), memcpy(out + 48 + 4 * i, &size, 4), memcpy(out + 68 + 4 * i, steps + i, 4);
    if (i + 1 < rank) memcpy(out + 88 + 8 * i, strides + i, 8);
  }
  uint64_t magic = MAGIC;
  memcpy(out + 120, &magic, 8);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const int *lower, const int *upper, cuuint32_t channels,
    cuuint32_t pixels, const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  REFUSE("cuTensorMapEncodeIm2col is not known to the stub");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **given, void **extra) {
  Function *f = (Function *)function;
  Stream *stream = (Stream *)config->hStream;
  if (current < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "launch without a context");
  if (!f || f->magic != MAGIC || f->module->magic != MAGIC)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "launch of no function, or of one that is unloaded");
  if (f->module->device != current)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: loaded on device %d, launched on %d", f->name, f->module->device, current);
  if (stream && stream->magic == MAGIC && stream->device != current)
    return refuse(CUDA_ERROR_INVALID_HANDLE, "%s: stream of device %d on %d", f->name, stream->device, current);
  unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ, cluster = 1;
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
    REFUSE("%s: grid %u x %u x %u", f->name, grid[0], grid[1], grid[2]);
  if (!threads || threads > 1024 || threads > (unsigned)f->threads) REFUSE("%s: %u threads of %d", f->name, threads, f->threads);
  if (f->required_threads && threads != (unsigned)f->required_threads)
    REFUSE("%s: %u threads where .reqntid says %d", f->name, threads, f->required_threads);
  if (config->sharedMemBytes > (unsigned)f->max_dynamic)
    REFUSE("%s: %u bytes of shared memory of %d that were opted in", f->name, config->sharedMemBytes, f->max_dynamic);
  unsigned allocated = (f->registers + 7) / 8 * 8 * 32 * ((threads + 31) / 32);
  if (allocated > 65536) return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u registers", f->name, allocated);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute *attribute = config->attrs + i;
    if (attribute->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    cluster = attribute->value.clusterDim.x * attribute->value.clusterDim.y * attribute->value.clusterDim.z;
    if (capability() < 90 || cluster > (f->non_portable ? 16u : 8u) || grid[0] % attribute->value.clusterDim.x)
      REFUSE("%s: cluster of %u", f->name, cluster);
  }
  if (extra) REFUSE("%s: extra launch parameters", f->name);
  static __thread unsigned char parameters[MOST_BYTES];
  unsigned bytes = 0;
  if (f->parameter_bytes > MOST_BYTES) REFUSE("%s: %d bytes of parameters", f->name, f->parameter_bytes);
  for (int i = 0; i < f->parameters; bytes += f->sizes[i++]) {
    unsigned size = f->sizes[i];
    if (!given[i]) REFUSE("%s: parameter %d is missing", f->name, i);
    if (size == 128 && ((uintptr_t)given[i] % 64 || word((unsigned char *)given[i] + 120, 8) != MAGIC))
      REFUSE("%s: parameter %d is no tensor map, or not at a multiple of 64 bytes", f->name, i);
    memcpy(parameters + bytes, given[i], size);
  }
  stub.launches++;
  return callback ? callback(f, grid, threads, config->sharedMemBytes, parameters, bytes) : CUDA_SUCCESS;
}
