#!/bin/sh
# Writes what an image holds to /sbom: Python's packages as CycloneDX and with their licences, and
# Debian's. The Dockerfile runs it in the targets cpu-sbom and gpu-sbom.
set -eu
python3 -m venv /opt/sbom
/opt/sbom/bin/pip install --quiet --no-cache-dir cyclonedx-bom==7.5.0 pip-licenses==5.5.5
mkdir /sbom
/opt/sbom/bin/cyclonedx-py environment --output-file /sbom/python.cdx.json /opt/rheostat
/opt/sbom/bin/pip-licenses --python /opt/rheostat/bin/python --format csv --with-urls \
    >/sbom/python-licences.csv
dpkg-query --show --showformat '${Package},${Version}\n' >/sbom/debian.csv
