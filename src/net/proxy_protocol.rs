//! PROXY protocol: versions 1 and 2 (HAProxy, "The PROXY protocol", 2020), parsed without input or output.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What a header says about the connection that the proxy before us took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// `None` where the proxy speaks for itself (LOCAL, such as a health check) or doesn't say (UNKNOWN, unix sockets):
    /// then the client is whoever connected to us.
    pub client: Option<SocketAddr>,
}

/// Why the first bytes of a connection are no good header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// These bytes are something else altogether, of a peer that does not speak the protocol.
    #[error("the connection doesn't begin with a PROXY protocol header")]
    Absent,
    #[error("malformed PROXY protocol header: {0}")]
    Invalid(&'static str),
}

/// The most bytes that [`read`] needs to see before it decides.
pub const HEADER_BYTES_MAX: usize = V2_FIXED_BYTES + V2_REST_BYTES_MAX;

/// Reads a header at the start of a connection's bytes; with how many bytes it took. `None`: go on reading, this may
/// become one.
pub fn read(buffer: &[u8]) -> Result<Option<(Source, usize)>, Malformed> {
    if begins_as(buffer, V2_SIGNATURE) {
        read_v2(buffer)
    } else if begins_as(buffer, V1_START) {
        read_v1(buffer)
    } else {
        Err(Malformed::Absent)
    }
}

const V1_START: &[u8] = b"PROXY ";
/// With its CRLF (section 2.1).
const V1_BYTES_MAX: usize = 107;

const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_FIXED_BYTES: usize = 16;
/// The protocol allows 64 KiB of addresses and extensions; real ones (a TLS name, an id) stay far below this.
const V2_REST_BYTES_MAX: usize = 4096;

/// True if the buffer begins with `start`, or is itself the beginning of it.
fn begins_as(buffer: &[u8], start: &[u8]) -> bool {
    let length = buffer.len().min(start.len());
    buffer[..length] == start[..length]
}

fn read_v1(buffer: &[u8]) -> Result<Option<(Source, usize)>, Malformed> {
    let seen = &buffer[..buffer.len().min(V1_BYTES_MAX)];
    let Some(end) = memchr::memchr(b'\n', seen) else {
        return if seen.len() == V1_BYTES_MAX { Err(Malformed::Invalid("the line is too long")) } else { Ok(None) };
    };
    let line = seen[..end].strip_suffix(b"\r").ok_or(Malformed::Invalid("the line doesn't end in CRLF"))?;
    let line = std::str::from_utf8(line).map_err(|_| Malformed::Invalid("the line is not ASCII"))?;
    // A line of which only a part of "PROXY " was there has no LF, except in that part: then it is another thing.
    let rest = line.strip_prefix("PROXY ").ok_or(Malformed::Absent)?;
    let mut words = rest.split(' ');
    let client = match words.next() {
        Some("UNKNOWN") => return Ok(Some((Source { client: None }, end + 1))),
        Some("TCP4") => v1_addresses::<Ipv4Addr>(words),
        Some("TCP6") => v1_addresses::<Ipv6Addr>(words),
        _ => return Err(Malformed::Invalid("the family is none of TCP4, TCP6 and UNKNOWN")),
    };
    let client = client.ok_or(Malformed::Invalid("the addresses or ports can't be read"))?;
    Ok(Some((Source { client: Some(client) }, end + 1)))
}

/// `SOURCE DESTINATION SOURCE_PORT DESTINATION_PORT`, and nothing after it.
fn v1_addresses<'a, A: std::str::FromStr + Into<IpAddr>>(words: impl Iterator<Item = &'a str>) -> Option<SocketAddr> {
    let words: Vec<&str> = words.take(5).collect();
    let [source, destination, source_port, destination_port] = words[..] else { return None };
    let source: A = source.parse().ok()?;
    let _: A = destination.parse().ok()?;
    let (source_port, _) = (v1_port(source_port)?, v1_port(destination_port)?);
    Some(client(source.into(), source_port))
}

/// Decimal digits only, without leading zeros.
fn v1_port(text: &str) -> Option<u16> {
    let is_canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    is_canonical.then(|| text.parse().ok()).flatten()
}

fn read_v2(buffer: &[u8]) -> Result<Option<(Source, usize)>, Malformed> {
    // Each byte is judged as soon as it is there: what can't become a header is not waited for.
    let Some(&version_and_command) = buffer.get(12) else { return Ok(None) };
    let is_local = match version_and_command {
        0x20 => true,
        0x21 => false,
        _ => return Err(Malformed::Invalid("the version is not 2, or the command neither LOCAL nor PROXY")),
    };
    let Some(&family) = buffer.get(13) else { return Ok(None) };
    if family >> 4 > 3 || family & 0x0f > 2 {
        return Err(Malformed::Invalid("the address family or transport is unknown"));
    }
    let Some(length) = buffer.get(14..V2_FIXED_BYTES) else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length > V2_REST_BYTES_MAX {
        return Err(Malformed::Invalid("it is longer than 4096 bytes"));
    }
    let whole = V2_FIXED_BYTES + length;
    let Some(rest) = buffer.get(V2_FIXED_BYTES..whole) else { return Ok(None) };
    let client = match family {
        _ if is_local => None,
        // What comes after the addresses are extensions (TLVs), none of which we need.
        0x11 => Some(v2_addresses::<4>(rest, 12)?),
        0x21 => Some(v2_addresses::<16>(rest, 36)?),
        _ => None,
    };
    Ok(Some((Source { client }, whole)))
}

/// Source address, destination address, source port, destination port: `length` bytes in all.
fn v2_addresses<const N: usize>(rest: &[u8], length: usize) -> Result<SocketAddr, Malformed>
where
    IpAddr: From<[u8; N]>,
{
    let too_short = Malformed::Invalid("it is too short for its address family");
    let addresses = rest.get(..length).ok_or(too_short)?;
    let (source, after) = addresses.split_first_chunk::<N>().ok_or(too_short)?;
    let port = after.get(N..N + 2).ok_or(too_short)?;
    Ok(client(IpAddr::from(*source), u16::from_be_bytes([port[0], port[1]])))
}

fn client(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(version_and_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut header = V2_SIGNATURE.to_vec();
        header.extend([version_and_command, family]);
        header.extend((rest.len() as u16).to_be_bytes());
        header.extend(rest);
        header
    }

    fn v2_tcp6(source: &str, port: u16) -> Vec<u8> {
        let mut rest = source.parse::<Ipv6Addr>().unwrap().octets().to_vec();
        rest.extend(Ipv6Addr::LOCALHOST.octets());
        rest.extend(port.to_be_bytes());
        rest.extend(443u16.to_be_bytes());
        v2(0x21, 0x21, &rest)
    }

    const TCP4: [u8; 12] = [1, 2, 3, 4, 10, 0, 0, 1, 0x12, 0x67, 0x01, 0xbb];

    fn good() -> Vec<(Vec<u8>, Option<&'static str>)> {
        let mut with_extensions = TCP4.to_vec();
        with_extensions.extend([0x04, 0, 3, 1, 2, 3]);
        vec![
            (b"PROXY TCP4 1.2.3.4 10.0.0.1 4711 443\r\n".to_vec(), Some("1.2.3.4:4711")),
            (b"PROXY TCP6 2001:db8::1 ::1 65535 0\r\n".to_vec(), Some("[2001:db8::1]:65535")),
            (b"PROXY TCP6 ::ffff:1.2.3.4 ::1 1 2\r\n".to_vec(), Some("1.2.3.4:1")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff::1 anything 1 2\r\n".to_vec(), None),
            (v2(0x21, 0x11, &TCP4), Some("1.2.3.4:4711")),
            (v2(0x21, 0x11, &with_extensions), Some("1.2.3.4:4711")),
            (v2_tcp6("2001:db8::1", 9), Some("[2001:db8::1]:9")),
            (v2_tcp6("::ffff:1.2.3.4", 9), Some("1.2.3.4:9")),
            (v2(0x20, 0x00, &[]), None),
            (v2(0x20, 0x11, &TCP4), None),
            (v2(0x21, 0x00, &[]), None),
            (v2(0x21, 0x12, &TCP4), None),
            (v2(0x21, 0x31, &[0; 216]), None),
        ]
    }

    #[test]
    fn good_headers_under_every_split() {
        for (header, client) in good() {
            let source = Source { client: client.map(|client| client.parse().unwrap()) };
            for length in 0..header.len() {
                assert_eq!(read(&header[..length]), Ok(None), "{length} bytes of {header:?}");
            }
            assert_eq!(read(&header), Ok(Some((source, header.len()))), "{header:?}");
            let followed = [&header[..], b"GET / HTTP/1.1\r\n"].concat();
            assert_eq!(read(&followed), Ok(Some((source, header.len()))), "{header:?}");
        }
    }

    #[test]
    fn other_protocols_are_told_at_their_first_difference() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"PRI",
            b"POST",
            b"PROXY\r\n",
            b"\x16\x03\x01",
            b"\r\nGET / HTTP/1.1",
            b"proxy TCP4",
        ] {
            assert_eq!(read(bytes), Err(Malformed::Absent), "{bytes:?}");
        }
    }

    #[test]
    fn bad_headers() {
        let long = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 200]].concat();
        let mut oversized = v2(0x21, 0x11, &TCP4);
        oversized[14..16].copy_from_slice(&4097u16.to_be_bytes());
        for bytes in [
            b"PROXY TCP4 1.2.3.4 10.0.0.1 4711 443\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 4711\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 4711 443 1\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 4711 443 \r\n".to_vec(),
            b"PROXY TCP4  1.2.3.4 10.0.0.1 4711 443\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 +4711 443\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 04711 443\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1 65536 443\r\n".to_vec(),
            b"PROXY TCP4 1.2.3.4 10.0.0.1  443\r\n".to_vec(),
            b"PROXY TCP4 ::1 ::1 1 2\r\n".to_vec(),
            b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n".to_vec(),
            b"PROXY UDP4 1.2.3.4 10.0.0.1 1 2\r\n".to_vec(),
            b"PROXY \r\n".to_vec(),
            b"PROXY \xff\r\n".to_vec(),
            long,
            v2(0x11, 0x11, &TCP4),
            v2(0x22, 0x11, &TCP4),
            v2(0x21, 0x41, &TCP4),
            v2(0x21, 0x13, &TCP4),
            v2(0x21, 0x11, &TCP4[..11]),
            v2(0x21, 0x21, &TCP4),
            oversized,
        ] {
            assert!(matches!(read(&bytes), Err(Malformed::Invalid(_))), "{bytes:?}: {:?}", read(&bytes));
        }
    }

    const STARTS: &[&[u8]] = &[b"", V1_START, b"PROXY TCP4 1.", V2_SIGNATURE, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0"];

    proptest! {
        #[test]
        fn whatever_comes_the_answer_is_bounded_and_stays(
            start in proptest::sample::select(STARTS),
            rest in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let bytes = [start, &rest].concat();
            let whole = read(&bytes);
            if let Ok(Some((_, length))) = whole {
                prop_assert!(length <= bytes.len() && length <= HEADER_BYTES_MAX);
            }
            // A decision, once taken, is not changed by more bytes; until then there is none.
            let mut decided = None;
            for length in 0..=bytes.len() {
                let answer = read(&bytes[..length]);
                match decided {
                    Some(earlier) => prop_assert_eq!(answer, earlier),
                    None if answer != Ok(None) => decided = Some(answer),
                    None => {}
                }
            }
        }

        #[test]
        fn every_address_is_read_back(source: [u8; 16], port: u16) {
            let address = Ipv6Addr::from(source);
            let expected = SocketAddr::new(IpAddr::V6(address).to_canonical(), port);
            let line = format!("PROXY TCP6 {address} ::1 {port} 443\r\n");
            for header in [line.into_bytes(), v2_tcp6(&address.to_string(), port)] {
                prop_assert_eq!(read(&header), Ok(Some((Source { client: Some(expected) }, header.len()))));
            }
        }
    }
}
