"""`python -m tests.servers install [samba] | list | fill LDAP-URL`."""

from __future__ import annotations

import sys

from tests.servers.install import main

raise SystemExit(main(sys.argv[1:]))
