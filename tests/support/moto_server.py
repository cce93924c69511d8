"""moto's server, with conditional writes that are atomic.

moto 5.2 answers each request on a thread of its own, and compares a write's If-Match or If-None-Match before it writes,
with no lock around the two: on a busy machine, two writes that expect the same ETag both succeed. S3 lets one of them
win, which is what the catalog and ZeroFS build on.
"""

import ctypes
import functools
import sys
import threading

from moto.s3.responses import S3Response
from moto.server import main

ONE_AT_A_TIME = threading.Lock()


def atomic(method):
    @functools.wraps(method)
    def locked(*args, **kwargs):
        with ONE_AT_A_TIME:
            return method(*args, **kwargs)

    return locked


for name in ["put_object", "copy_object", "delete_object", "_key_response_post"]:
    setattr(S3Response, name, atomic(getattr(S3Response, name)))

if __name__ == "__main__":
    # What scripts/leftovers knows it by: PR_SET_NAME.
    ctypes.CDLL(None).prctl(15, b"moto_server", 0, 0, 0)
    sys.exit(main())
