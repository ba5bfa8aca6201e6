// In builds of torch for CPUs: lets operators on FakeTensors of device cuda switch to it, which does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct OneDevice final : public NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, OneDevice);
}  // namespace c10::impl
