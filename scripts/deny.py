#!/usr/bin/env python3
"""Checks the dependencies against deny.toml: licences, second versions of a crate, sources.

Needs Python 3.11, and no network once the crates of Cargo.lock are fetched. Covers a part of cargo-deny; security advisories
and yanked versions need `cargo deny check`.

    scripts/deny.py
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def packages(rules):
    """The packages of the dependency graph that deny.toml selects, without the workspace's own."""
    command = ["cargo", "metadata", "--format-version=1", "--locked"]
    command += [f"--filter-platform={target}" for target in rules["graph"]["targets"]]
    if rules["graph"]["all-features"]:
        command.append("--all-features")
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    metadata = json.loads(output)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    return [p for p in metadata["packages"] if p["id"] in used and p["source"] is not None]


def is_allowed(expression, allowed, needed):
    """Evaluates an SPDX expression. Adds the allowed licences that it names to `needed`."""
    words = []
    for word in re.findall(r"[()]|[\w.+-]+(?: WITH [\w.-]+)?", expression.replace("/", " OR ")):
        if word in ("AND", "OR"):
            words.append(word.lower())
        elif word in "()":
            words.append(word)
        else:
            words.append(str(word in allowed))
            needed.add(word)
    return bool(words) and eval(" ".join(words), {})  # only True, False, and, or, parentheses


def main():
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    found, errors = packages(rules), []

    allowed, needed = set(rules["licenses"]["allow"]), set()
    for package in found:
        if not is_allowed(package["license"] or "", allowed, needed):
            errors.append(f"{package['name']} {package['version']}: licence {package['license']} is not allowed")
    errors += [f"deny.toml: no crate has the licence {licence}" for licence in sorted(allowed - needed)]

    versions, rules_for = defaultdict(list), defaultdict(list)
    for package in found:
        versions[package["name"]].append(package["version"])
    for rule in rules["bans"]["skip"]:
        name, prefix = rule["crate"].split("@")
        rules_for[name].append(prefix)
    for name, present in versions.items():
        kept = [v for v in present if not any(f"{v}.".startswith(f"{prefix}.") for prefix in rules_for[name])]
        if len(kept) > 1:
            errors.append(f"{name} has versions {', '.join(present)}")
    for name, prefixes in rules_for.items():
        for prefix in prefixes:
            if not (len(versions[name]) > 1 and any(f"{v}.".startswith(f"{prefix}.") for v in versions[name])):
                errors.append(f"deny.toml: {name}@{prefix} is not a second version")

    registries = {f"registry+{url}" for url in rules["sources"]["allow-registry"]}
    for package in found:
        if package["source"] not in registries:
            errors.append(f"{package['name']} {package['version']}: source {package['source']} is not allowed")

    print("\n".join(errors) or f"{len(found)} dependencies: licences, versions and sources are allowed")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
