"""Which addresses of the internet may be connected to."""

import ipaddress
from collections.abc import Iterator

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_REFUSED = (
    ipaddress.IPv6Network("fec0::/10"),  # site-local addresses, deprecated, RFC 3879
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # local NAT64, RFC 8215
    ipaddress.IPv6Network("::/96"),  # addresses compatible with IPv4, deprecated, RFC 4291
)


def is_public(text: str) -> bool:
    """Returns whether an address, and every IPv4 address in it, is an address of a host on the internet.

    `is_global` alone is true for multicast addresses, and for IPv6 addresses that lead to local IPv4 addresses.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    has_zone = "%" in text
    return not has_zone and all(map(_is_public_host, (address, *_embedded(address))))


def _is_public_host(address: _Address) -> bool:
    if any(address in network for network in _REFUSED):
        return False
    is_wrapper = next(_embedded(address), None) is not None
    is_local = address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local
    return not is_local and (is_wrapper or (address.is_global and not address.is_reserved))


def _embedded(address: _Address) -> Iterator[_Address]:
    """Yields the IPv4 addresses that packets to an IPv6 address may reach."""
    if not isinstance(address, ipaddress.IPv6Address):
        return
    if address.ipv4_mapped:
        yield address.ipv4_mapped
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
