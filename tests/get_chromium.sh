#!/usr/bin/env bash
# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
# A headless Chromium for the tests of the report's page, without root: the build of the npm package
# @sparticuz/chromium (x86-64 Linux), unpacked into a folder with the libraries and the font that it needs.
#
#   export CUMA_CHROMIUM=$(bash tests/get_chromium.sh [FOLDER])     # needs npm and node; about 70 MB to download
#
# Prints the path of the program. A folder that already holds it is left as it is.
set -euo pipefail
version=147.0.0
sha256=18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b

folder=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/trl_cuma/chromium-$version}")
program=$folder/chromium.sh
if [ ! -x "$program" ]; then
    command -v npm >/dev/null && command -v node >/dev/null || {
        echo "get_chromium.sh: needs npm and node. With root, a distribution's package chromium serves as well." >&2
        exit 1
    }
    mkdir -p "$(dirname "$folder")"
    staging=$(mktemp -d "$folder-incomplete-XXXXXX")
    trap 'rm -rf "$staging"' EXIT
    (cd "$staging" && npm pack --silent "@sparticuz/chromium@$version" >/dev/null)
    echo "$sha256  $staging/sparticuz-chromium-$version.tgz" | sha256sum --check --quiet >&2
    tar -xzf "$staging/sparticuz-chromium-$version.tgz" -C "$staging" package/bin
    for name in chromium al2023.tar fonts.tar swiftshader.tar; do
        node -e 'const {createReadStream: r, createWriteStream: w} = require("fs");
            r(process.argv[1]).pipe(require("zlib").createBrotliDecompress()).pipe(w(process.argv[2]))' \
            "$staging/package/bin/$name.br" "$staging/$name"
    done
    for name in al2023 fonts swiftshader; do
        tar -xf "$staging/$name.tar" -C "$staging"
    done
    rm -r "$staging"/package "$staging"/*.tar "$staging"/*.tgz
    chmod +x "$staging/chromium"
    cat >"$staging/fonts.conf" <<FONTS
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>$folder/fonts</dir><dir>/usr/share/fonts</dir><cachedir>$folder/cache</cachedir></fontconfig>
FONTS
    cat >"$staging/chromium.sh" <<'SCRIPT'
#!/usr/bin/env bash
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} FONTCONFIG_FILE=$here/fonts.conf
exec "$here/chromium" "$@"
SCRIPT
    chmod +x "$staging/chromium.sh"
    mv -T "$staging" "$folder"
    trap - EXIT
fi
echo "$program"
