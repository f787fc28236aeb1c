"""A simulated H100: tensors without data on cuda:0, and kernels that are assembled but never run.

For processes in the environment of ``environment.py``. ``pretend_device`` makes PyTorch accept
tensors on cuda:0 under ``FakeTensorMode``; ``attend_with`` chooses the back end of attention;
``pretend_compiler`` has Inductor generate code for sm_90 and Triton assemble it. All of them change
the process for good.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_DEVICES = 8
_CAPABILITY = (9, 0)
# As ``torch.cuda.get_device_properties`` describes an H100 SXM.
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=_CAPABILITY[0],
    minor=_CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    is_integrated=0,
    uuid="0",
)


def pretend_device() -> None:
    """Make PyTorch treat cuda:0 as an H100. Only tensors without data can be on it."""
    answers: dict[str, Any] = {
        "get_device_properties": _PROPERTIES,
        "get_device_capability": _CAPABILITY,
        "get_device_name": _PROPERTIES.name,
        "device_count": _DEVICES,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "is_bf16_supported": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_arch_list": ["sm_90"],
        "is_initialized": False,
        # Otherwise callers would then call the driver.
        "is_available": False,
        "_lazy_init": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(os.environ["DEVICE_COUNT_LIBRARY"]).set_device_count(_DEVICES)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class OnlyDeviceFake(FakeTensorMode):
    """Fake tensors on the device only; operators on the host alone are computed."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run operators that neither read nor create a tensor on the device as usual."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        makes_one = device is not None and torch.device(device).type == DEVICE.type
        leaves = tree_leaves((args, kwargs))
        if makes_one or any(type(x) not in _PLAIN for x in leaves if isinstance(x, Tensor)):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


_PLAIN = (Tensor, torch.nn.Parameter)

# ---------------------------------------------------------------------------- attention


def attend_with(backend: str) -> None:
    """Replace ``scaled_dot_product_attention`` by the operator of one back end.

    The choice between them is made in C++ by questions to the device.

    Args:
        backend: ``cudnn`` or ``flash``.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any
    ) -> Tensor:
        aten = torch.ops.aten
        if backend == "flash":
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal
        )[0]

    chosen = SDPBackend.FLASH_ATTENTION if backend == "flash" else SDPBackend.CUDNN_ATTENTION
    setattr(torch, "_fused_sdp_choice", _always(chosen.value))  # noqa: B010
    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = attention


# ---------------------------------------------------------------------------- compiler


@dataclass
class Assembler:
    """Kernels that Triton was asked to assemble."""

    kernels: int = 0
    cubins: int = 0


def pretend_compiler() -> Assembler:
    """Make Inductor compile for sm_90 and assemble one configuration of every kernel.

    (Inductor times the configurations of a kernel against each other when it first runs.)
    """
    import torch._dynamo.device_interface as interface
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.runtime.triton_helpers as triton_helpers

    cuda: Any = interface.CudaInterface
    answers: dict[str, Any] = {
        "is_available": True,
        "get_raw_stream": 0,
        "synchronize": None,
        "current_device": 0,
        "set_device": None,
        "device_count": _DEVICES,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_device_properties": _PROPERTIES,
        "get_compute_capability": 90,
        "is_bf16_supported": True,
    }
    for name, value in answers.items():
        setattr(cuda, name, staticmethod(_always(value)))
    inductor_config.compile_threads = 1
    inductor_config.force_disable_caches = True
    for launcher in ("use_static_cuda_launcher", "use_static_triton_launcher"):  # 2.11, 2.13
        if hasattr(inductor_config, launcher):
            setattr(inductor_config, launcher, False)
    # Inductor decides on padding by benchmarks, which need a device.
    inductor_config.shape_padding = False
    # Kernels that differ only in their number are then equal, and Triton's cache finds them.
    inductor_config.triton.unique_kernel_names = False
    functorch_config.force_non_lazy_backward_lowering = True
    triton_helpers.set_driver_to_gpu = _always(None)
    _pretend_driver()
    _fold_constants_on_cpu()
    return _assemble_only()


def _pretend_driver() -> None:
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]
    from triton.runtime.driver import driver  # type: ignore[import-not-found]

    class Driver:
        """Replaces Triton's driver during compilation."""

        launcher_cls = None
        get_current_target = staticmethod(_always(GPUTarget("cuda", 90, 32)))
        get_current_device = staticmethod(_always(0))
        set_current_device = staticmethod(_always(None))
        get_current_stream = staticmethod(_always(0))
        get_active_torch_device = staticmethod(_always(DEVICE))
        get_device_interface = staticmethod(_always(torch.cuda))
        is_active = staticmethod(_always(True))
        utils = SimpleNamespace(
            get_device_properties=_always(
                {
                    "max_shared_mem": _PROPERTIES.shared_memory_per_block_optin,
                    "max_num_regs": _PROPERTIES.regs_per_multiprocessor,
                    "multiprocessor_count": _PROPERTIES.multi_processor_count,
                    "warpSize": _PROPERTIES.warp_size,
                    "sm_clock_rate": _PROPERTIES.clock_rate,
                    "mem_clock_rate": _PROPERTIES.memory_clock_rate,
                    "mem_bus_width": _PROPERTIES.memory_bus_width,
                }
            ),
            load_binary=_always((0, 0, 0, 0, 1024)),
        )

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    driver.set_active(Driver())


def _fold_constants_on_cpu() -> None:
    """Make Inductor evaluate constants of a graph on the CPU."""
    from torch._inductor.fx_passes import joint_graph

    folder: Any = joint_graph.UniformValueConstantFolder

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    deduce = folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with OnCpu():
            return deduce(self, node)

    folder._deduce_value = deduce_on_cpu


def _assemble_only() -> Assembler:
    """Compile Inductor's kernels to cubins, without loading or launching them."""
    from torch._inductor.runtime import triton_heuristics

    autotuner: Any = triton_heuristics.CachingAutotuner
    assembler = Assembler()

    def precompile(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled = self._precompile_config(self.configs[0])
        assembler.kernels += 1
        assembler.cubins += bool(compiled.kernel.asm.get("cubin"))

    autotuner.precompile = precompile
    return assembler
