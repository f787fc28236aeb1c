// Replaces c10::cuda::device_count (LD_PRELOAD): no device while torch is imported, then as many as
// set_device_count says, so that tensors without data can be on cuda:0.

namespace {
signed char count = 0;
}

extern "C" void set_device_count(int devices) { count = static_cast<signed char>(devices); }

namespace c10::cuda {
signed char device_count() noexcept { return count; }
}
