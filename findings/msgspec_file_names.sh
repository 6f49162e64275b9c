#!/usr/bin/env bash
# msgspec 0.23.0: an annotation file with a Latin-1 file name is "malformed" to it.
#
# Guess: msgspec reads what json.dumps wrote, NaN and Infinity apart.
# Seen: os.listdir gives a name that is not UTF-8 as "caf\udce9.jpg", json.dumps writes it as an escape,
# json.loads reads it and the image opens. msgspec.json.decode refuses the whole file (DecodeError,
# "invalid utf-16 surrogate pair"), and msgspec.json.encode the name (UnicodeEncodeError). Archives of
# images made under Windows have such names.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet msgspec==0.23.0
cd "$directory"
cat > script.py <<'PYTHON'
import json
import os
import sys

import msgspec

os.mkdir("images")
with open(b"images/caf\xe9.jpg", "wb"):
    pass
name = os.listdir("images")[0]
text = json.dumps({"images": [{"id": 1, "file_name": name}]})
read = json.loads(text)["images"][0]["file_name"]
print(f"msgspec {msgspec.__version__}: json writes {text}")
print("json reads it, the file exists:", os.path.exists(os.path.join("images", read)))


def attempt(function, value):
    try:
        return repr(function(value))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


decoded = attempt(msgspec.json.decode, text)
encoded = attempt(msgspec.json.encode, name)
print("msgspec.json.decode:", decoded)
print("msgspec.json.encode:", encoded)
same = decoded.startswith("DecodeError") and encoded.startswith("UnicodeEncodeError")
sys.exit(0 if same else 1)
PYTHON
"$directory/venv/bin/python" script.py
