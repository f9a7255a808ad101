"""A Google Cloud Storage server on this machine, with a bucket `bucket`, as an fsspec file system."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from tests.train.programs import free_port


@contextlib.contextmanager
def gcs_server() -> Iterator[Any]:
    """Runs the server until the end of the block. Programs that are started in it find it by its environment."""
    handlers = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    port = free_port()
    url = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handlers, "download", _with_generation(handlers.download))
        server_module = pytest.importorskip("gcp_storage_emulator.server")  # its table of handlers is made here
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # read by gcsfs and Orbax
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # otherwise gcsfs asks for the bucket's type
        pytest.importorskip("gcsfs")
        # Clients that do not read an answer to its end are no error.
        patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # objects that do not exist
        with server_module.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield fsspec.filesystem("gs")
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def _with_generation(download: Any) -> Any:
    """Adds the generation of an object to a download: Google's servers send it, and TensorStore needs it."""

    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # the object does not exist
            info = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = info["generation"]
            response["x-goog-metageneration"] = info["metageneration"]
        return download(request, response, storage, *args, **kwargs)

    return handle
