"""Merge by the path that RWKV-PEFT's script has since Bone is called DiSHA there."""

import merge_bone  # noqa: F401
