"""Whether an address can be served on, in the kernel's own words: gRPC does not pass them on."""

import socket


def bind_problem(host: str, port: int, reuse_port: bool = False) -> str:
    """Why nothing can listen on host:port now; "" if something can. Binds and lets go again.

    With `reuse_port` others that also share the port are no hindrance.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""
