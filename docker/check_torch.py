"""End the build if the torch that pip chose is not for the device that was asked for: check_torch.py {cpu,cuda}."""

import runpy
import sys
import sysconfig

device = sys.argv[1]
if device not in ("cpu", "cuda"):
    sys.exit(f"DEVICE must be cpu or cuda. Got {device!r}.")
version = runpy.run_path(sysconfig.get_path("purelib") + "/torch/version.py")  # without its libraries, not there yet
if (version["cuda"] is not None) != (device == "cuda"):
    hint = "Name the index of the wheels in --build-arg TORCH_INDEX=URL, or the other DEVICE."
    sys.exit(f"DEVICE={device}, but pip chose torch {version['__version__']} (CUDA {version['cuda']}). {hint}")
