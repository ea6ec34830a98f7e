#!/usr/bin/env bash
# Install a wheel into an empty environment, away from the repository, and run the README's first example with it.
set -euo pipefail
wheel=$(realpath "$1"); readme=$(realpath "$(dirname "$0")/../README.md")
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install -q "$wheel"
cd "$place"
"$place/env/bin/python" - "$readme" > example.py <<'PY'
import re, sys
text = open(sys.argv[1], encoding='utf-8').read()
print(re.search(r'```python\n(.*?)```', text, re.S)[1])
PY
"$place/env/bin/python" example.py
"$place/env/bin/python" -c "import sys, kdnotes; assert 'torch' not in sys.modules; from kdnotes.losses.channel_wise import ChannelWise; assert not {'torchvision', 'timm', 'matplotlib'} & set(sys.modules)"
"$place/env/bin/kdnotes_compare" --recipe scenes --methods channel_wise --seeds 1 --max_steps 2 --out out
test -s out/report.html
echo "the wheel works in an empty environment"
