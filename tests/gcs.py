"""A Google Cloud Storage server on this machine: an emulator, with what it lacks of Google's."""

import contextlib
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import fsspec
import pytest

from tests.train.programs import free_port

_MOVE = r".*/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<target>.*[^/]+)"


@contextlib.contextmanager
def gcs_server() -> Iterator[Any]:
    """Yields the fsspec file system of a server with a bucket, `bucket`.

    Programs that are started in the block find the server by their environment.
    """
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    url = f"http://localhost:{(port := free_port())}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", _with_generation(objects.download))
        server_module = pytest.importorskip("gcp_storage_emulator.server")  # its table of handlers is made here
        patch.setattr(server_module, "HANDLERS", ((_MOVE, {"POST": _move}), *server_module.HANDLERS))
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # read by gcsfs and Orbax
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv("NO_GCE_CHECK", "true")  # no credentials from a machine of Google
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gcsfs does not ask for the kind of the bucket
        pytest.importorskip("gcsfs")
        patch.setattr("http.server.HTTPServer.request_queue_size", 512)  # a client waits seconds if the queue is full
        # Clients that do not read an answer to its end, and objects that do not exist, are no errors.
        patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        with server_module.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield fsspec.filesystem("gs", use_listings_cache=False)
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def _with_generation(download: Any) -> Any:
    """Adds the generation of an object to the headers of its content, which TensorStore needs."""

    def handle(request: Any, response: Any, storage: Any) -> Any:
        with contextlib.suppress(Exception):  # the object does not exist
            info = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = info["generation"]
            response["x-goog-metageneration"] = info["metageneration"]
        return download(request, response, storage)

    return handle


def _move(request: Any, response: Any, storage: Any) -> None:
    """The request by which gcsfs renames an object."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    bucket, source, target = (request.params[name] for name in ("bucket_name", "object_id", "target"))
    try:
        response.json(objects._copy(request.base_url, storage, bucket, source, bucket, target))
        objects._delete(storage, bucket, source)
    except NotFound:
        response.status = HTTPStatus.NOT_FOUND
