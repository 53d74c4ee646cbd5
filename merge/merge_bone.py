"""Merge by the path of RWKV-PEFT's script: `python merge/merge_bone.py` is `python merge.py`.

(This folder must never hold an __init__.py: `import merge` is to find merge.py.)
"""

import pathlib
import runpy
import sys

root = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(root)
runpy.run_path(str(root / "merge.py"), run_name="__main__")
