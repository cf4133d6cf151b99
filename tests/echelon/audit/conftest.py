"""Makes `scripted_run` importable: the runs that these tests audit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
