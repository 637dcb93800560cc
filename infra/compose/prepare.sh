#!/usr/bin/env bash
# Makes what compose.yaml needs beside it, once: secrets, and the store's folder. What is there stays.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p secrets data/store
# The store runs as a user of its own, whose number this machine may not know.
chmod 1777 data/store
# Compose mounts secrets as they are, and containers must be able to read them; others can't get here.
chmod 700 secrets
make_secret() { [ -s "secrets/$1" ] || head -c "$2" /dev/urandom | od -An -tx1 | tr -d ' \n' > "secrets/$1"; }
make_secret ray_token 32
make_secret postgres_password 24
make_secret store_access_key 10
make_secret store_secret_key 24
make_secret grafana_password 16
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
    "$(cat secrets/store_access_key)" "$(cat secrets/store_secret_key)" > secrets/store_credentials
chmod 444 secrets/[a-z]*
[ -e .env ] || cp env.example .env
