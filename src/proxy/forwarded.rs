//! Forwarded: who the client really is, and what endpoints are told about it (RFC 7239 and the X-Forwarded fields).

use std::net::IpAddr;

use ipnet::IpNet;

use crate::http1::valid_authority;
use crate::message::Fields;
use crate::proxy::edits;

/// Who is at the other end of the client's connection, with what each of its requests will say of that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `None` for a unix socket.
    pub address: Option<IpAddr>,
    /// The connection to us is TLS.
    pub tls: bool,
    /// For X-Forwarded-For.
    plain: Box<str>,
    /// For Forwarded: a node of RFC 7239 section 6, where an IPv6 address is in brackets and therefore quoted.
    node: Box<str>,
}

/// Where the client sees us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// `http` or `https`.
    pub scheme: &'static str,
    /// Where it is another than that of the request.
    authority: Option<String>,
}

/// The random numbers of one request's ids, for those that it didn't bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestIds {
    pub request_id: [u8; 16],
    pub trace: [u8; 16],
    pub span: [u8; 8],
}

impl RequestIds {
    /// Cuts 40 random bytes up, which come cheaper at once.
    pub fn from_random(random: [u8; 40]) -> RequestIds {
        let mut ids = RequestIds { request_id: [0; 16], trace: [0; 16], span: [0; 8] };
        ids.request_id.copy_from_slice(&random[..16]);
        ids.trace.copy_from_slice(&random[16..32]);
        ids.span.copy_from_slice(&random[32..]);
        ids
    }
}

impl Peer {
    pub fn new(address: Option<IpAddr>, tls: bool) -> Peer {
        let address = address.map(|address| address.to_canonical());
        let plain = address.map_or_else(|| "unknown".to_owned(), |address| address.to_string());
        let node = match address {
            Some(IpAddr::V6(address)) => format!("\"[{address}]\""),
            _ => plain.clone(),
        };
        Peer { address, tls, plain: plain.into(), node: node.into() }
    }

    /// The scheme that the client used, as this peer shows it.
    pub fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// True if the peer is one of `trusted_proxies`. A unix socket has no address and is never one.
    pub fn is_trusted(&self, trusted_proxies: &[IpNet]) -> bool {
        self.address.is_some_and(|address| contains(trusted_proxies, address.to_canonical()))
    }
}

impl Outside {
    /// As the connection shows it.
    pub fn of(peer: &Peer) -> Outside {
        Outside { scheme: peer.scheme(), authority: None }
    }

    /// As a trusted peer tells it: the proxy in front may be the one that speaks TLS, under a name of its own. What it does
    /// not tell, or not so that it could be used, is as the connection shows it.
    pub fn told(peer: &Peer, fields: &Fields) -> Outside {
        let outermost = |name: &str| fields.get(name)?.split(|byte| *byte == b',').next();
        let in_forwarded = |name: &[u8]| parameter(outermost(FORWARDED)?, name);
        let scheme = outermost(PROTO).or_else(|| in_forwarded(b"proto")).map(unquoted);
        let authority = outermost(HOST).or_else(|| in_forwarded(b"host")).map(unquoted);
        Outside {
            scheme: match scheme {
                Some(scheme) if scheme.eq_ignore_ascii_case(b"https") => "https",
                Some(scheme) if scheme.eq_ignore_ascii_case(b"http") => "http",
                _ => peer.scheme(),
            },
            authority: authority
                .filter(|authority| valid_authority(authority))
                .map(|authority| String::from_utf8_lossy(authority).into_owned()),
        }
    }

    /// `of_request`: the authority of the request.
    pub fn authority<'a>(&'a self, of_request: &'a str) -> &'a str {
        self.authority.as_deref().unwrap_or(of_request)
    }
}

/// The client as far as it is known for certain: the peer, or if that is a trusted proxy the rightmost address that is none
/// in X-Forwarded-For, or in Forwarded where that is all there is. `None` where the peer is a unix socket.
pub fn effective_client(peer: Option<IpAddr>, trusted_proxies: &[IpNet], fields: &Fields) -> Option<IpAddr> {
    let mut client = peer?.to_canonical();
    if !contains(trusted_proxies, client) {
        return Some(client);
    }
    let plainly = fields.contains(FOR);
    let name = if plainly { FOR } else { FORWARDED };
    let read = |hop| if plainly { parse_address(hop) } else { parse_element(hop) };
    // From right to left over all fields of the name, without collecting them: HOPS_MAX bounds what one look costs.
    let count = fields.get_all(name).count();
    let hops = (0..count)
        .rev()
        .filter_map(|index| fields.get_all(name).nth(index))
        .flat_map(|value| value.rsplit(|byte| *byte == b','));
    for hop in hops.take(HOPS_MAX) {
        // Behind something unreadable nothing can be believed; the last proxy that we know stands for it.
        let Some(address) = read(hop) else { break };
        client = address;
        if !contains(trusted_proxies, client) {
            break;
        }
    }
    Some(client)
}

/// Tells the endpoint who the client is. What an untrusted peer said about it is removed, and the fields set afresh; a
/// trusted one is appended to `X-Forwarded-For` (and to `Forwarded`, if that is there), and what it said is kept. From
/// untrusted peers, `longhaul-*` fields are removed too: these are ours.
///
/// `scheme` and `authority` are those of the client's request; an empty authority (HTTP/1.0) is not told.
pub fn apply(fields: &mut Fields, peer: &Peer, is_trusted: bool, scheme: &str, authority: &str) {
    if is_trusted {
        append_to_list(fields, FOR, &peer.plain);
        if fields.contains(FORWARDED) {
            append_to_list(fields, FORWARDED, &format!("for={}", peer.node));
        }
        if !fields.contains(PROTO) {
            fields.append(PROTO, scheme.as_bytes());
        }
        if !fields.contains(HOST) && !authority.is_empty() {
            fields.append(HOST, authority.as_bytes());
        }
        return;
    }
    fields.retain(|name, _| {
        // By their first letter most are settled.
        if !matches!(name, [b'x' | b'X' | b'f' | b'F' | b'l' | b'L', ..]) {
            return true;
        }
        let is_claim = [FOR, PROTO, HOST, FORWARDED].iter().any(|claim| name.eq_ignore_ascii_case(claim.as_bytes()));
        !is_claim && !edits::is_own(name)
    });
    fields.append(FOR, peer.plain.as_bytes());
    fields.append(PROTO, scheme.as_bytes());
    if !authority.is_empty() {
        fields.append(HOST, authority.as_bytes());
    }
    fields.append_with(FORWARDED, |element| {
        element.extend_from_slice(b"for=");
        element.extend_from_slice(peer.node.as_bytes());
        if !authority.is_empty() {
            element.extend_from_slice(b";host=");
            push_value(element, authority.as_bytes());
        }
        element.extend_from_slice(b";proto=");
        element.extend_from_slice(scheme.as_bytes());
    });
}

/// Gives the request an `x-request-id` (a UUID) and a `traceparent` (W3C Trace Context, sampled) where it has none.
pub fn add_ids(fields: &mut Fields, ids: &RequestIds) {
    if lacks(fields, REQUEST_ID) {
        let id = uuid::Builder::from_random_bytes(ids.request_id).into_uuid();
        let mut buffer = uuid::Uuid::encode_buffer();
        fields.append(REQUEST_ID, id.hyphenated().encode_lower(&mut buffer).as_bytes());
    }
    if lacks(fields, TRACEPARENT) {
        fields.append_with(TRACEPARENT, |text| {
            text.extend_from_slice(b"00-");
            push_hex(text, &ids.trace);
            text.push(b'-');
            push_hex(text, &ids.span);
            text.extend_from_slice(b"-01");
        });
        // It belongs to the traceparent that isn't there.
        fields.remove("tracestate");
    }
}

/// There is no such field, or there was an empty one, which is removed.
fn lacks(fields: &mut Fields, name: &str) -> bool {
    match fields.get(name) {
        None => true,
        Some([]) => {
            fields.remove(name);
            true
        }
        Some(_) => false,
    }
}

const FOR: &str = "x-forwarded-for";
const PROTO: &str = "x-forwarded-proto";
const HOST: &str = "x-forwarded-host";
const FORWARDED: &str = "forwarded";
const REQUEST_ID: &str = "x-request-id";
const TRACEPARENT: &str = "traceparent";

/// More proxies than any real chain has.
const HOPS_MAX: usize = 64;

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// An element of X-Forwarded-For: an address, which some proxies write with a port.
fn parse_address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element).ok()?.trim_matches([' ', '\t', '"']);
    let address: IpAddr = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.0.parse().ok()?,
        None => match text.parse() {
            Ok(address) => address,
            Err(_) => text.parse::<std::net::SocketAddrV4>().ok().map(|socket| IpAddr::V4(*socket.ip()))?,
        },
    };
    Some(address.to_canonical())
}

/// An element of Forwarded (RFC 7239 section 4) that names an address.
fn parse_element(element: &[u8]) -> Option<IpAddr> {
    parse_address(parameter(element, b"for")?)
}

/// A parameter of an element of Forwarded, quotes included. Half an element has none that could be believed: a comma within
/// quotes has split it. Nor has one with an escaped quote.
fn parameter<'a>(element: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let quotes = memchr::memchr_iter(b'"', element).count();
    if quotes % 2 == 1 || memchr::memchr(b'\\', element).is_some() {
        return None;
    }
    let mut in_quotes = false;
    // What is quoted may come from a client, as its Host does.
    let mut pairs = element.split(|byte| {
        in_quotes ^= *byte == b'"';
        *byte == b';' && !in_quotes
    });
    pairs.find_map(|pair| {
        let (found, value) = pair.split_at(memchr::memchr(b'=', pair)?);
        found.trim_ascii().eq_ignore_ascii_case(name).then(|| &value[1..])
    })
}

fn unquoted(value: &[u8]) -> &[u8] {
    let value = value.trim_ascii();
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

/// All fields of the name become one list, with `element` last: many programs read only the first field, or the last.
fn append_to_list(fields: &mut Fields, name: &str, element: &str) {
    let mut list = Vec::new();
    for value in fields.get_all(name).filter(|value| !value.is_empty()) {
        list.extend_from_slice(value);
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element.as_bytes());
    fields.set(name, &list);
}

/// A token as it is, anything else as a quoted string (RFC 9110 section 5.6.4).
fn push_value(text: &mut Vec<u8>, value: &[u8]) {
    let in_token = |byte: &u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~')
    };
    if value.iter().all(in_token) {
        text.extend_from_slice(value);
        return;
    }
    text.push(b'"');
    let plain = memchr::memchr2(b'"', b'\\', value).unwrap_or(value.len());
    text.extend_from_slice(&value[..plain]);
    for byte in &value[plain..] {
        if matches!(byte, b'"' | b'\\') {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    text.push(b'"');
}

fn push_hex<const N: usize>(text: &mut Vec<u8>, bytes: &[u8; N]) {
    // All zeros would be an invalid id (W3C Trace Context section 3.2.2.3).
    let is_zero = *bytes == [0; N];
    let mut pairs = bytes.map(|byte| HEX_PAIRS[usize::from(byte)]);
    if is_zero {
        pairs[0] = *b"01";
    }
    text.extend_from_slice(pairs.as_flattened());
}

/// The two digits of every byte.
static HEX_PAIRS: [[u8; 2]; 256] = {
    let digits = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [digits[byte >> 4], digits[byte & 15]];
        byte += 1;
    }
    pairs
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(list: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (name, value) in list {
            fields.append(name, value.as_bytes());
        }
        fields
    }

    fn list(fields: &Fields) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let mut list: Vec<_> = fields.iter().map(|(name, value)| (text(name).to_lowercase(), text(value))).collect();
        list.sort();
        list
    }

    fn networks() -> Vec<IpNet> {
        vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]
    }

    fn peer(address: &str) -> Peer {
        Peer::new(Some(address.parse().unwrap()), true)
    }

    #[test]
    fn the_client_is_the_rightmost_address_that_is_no_trusted_proxy() {
        for (address, forwarded_for, expected) in [
            ("1.2.3.4", vec![], "1.2.3.4"),
            ("1.2.3.4", vec!["10.0.0.1"], "1.2.3.4"),
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("10.0.0.1", vec!["5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["6.6.6.6, 5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["6.6.6.6, 5.6.7.8, 10.9.9.9"], "5.6.7.8"),
            ("10.0.0.1", vec!["6.6.6.6", "5.6.7.8 ,10.9.9.9"], "5.6.7.8"),
            ("10.0.0.1", vec!["6.6.6.6, nonsense, 10.9.9.9"], "10.9.9.9"),
            ("10.0.0.1", vec!["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
            ("10.0.0.1", vec!["5.6.7.8:4711"], "5.6.7.8"),
            ("10.0.0.1", vec!["[2001:db8::1]:4711"], "2001:db8::1"),
            ("fd00::1", vec!["2001:db8::1"], "2001:db8::1"),
            ("::ffff:10.0.0.1", vec!["5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec![""], "10.0.0.1"),
        ] {
            let fields = fields(&forwarded_for.iter().map(|value| ("X-Forwarded-For", *value)).collect::<Vec<_>>());
            let client = effective_client(Some(address.parse().unwrap()), &networks(), &fields);
            assert_eq!(client, Some(expected.parse().unwrap()), "{address} {forwarded_for:?}");
        }
        assert_eq!(effective_client(None, &networks(), &fields(&[("x-forwarded-for", "1.2.3.4")])), None);
    }

    #[test]
    fn forwarded_tells_the_client_where_nothing_else_does() {
        for (address, forwarded, expected) in [
            ("1.2.3.4", vec!["for=5.6.7.8"], "1.2.3.4"),
            ("10.0.0.1", vec!["for=5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["for=6.6.6.6, proto=https;For=\"5.6.7.8:4711\";by=10.0.0.1"], "5.6.7.8"),
            ("10.0.0.1", vec!["for=6.6.6.6", "for=5.6.7.8 ,for=10.9.9.9"], "5.6.7.8"),
            ("10.0.0.1", vec!["for=\"[2001:db8::1]:4711\""], "2001:db8::1"),
            ("10.0.0.1", vec!["for=5.6.7.8, for=unknown, for=10.9.9.9"], "10.9.9.9"),
            ("10.0.0.1", vec!["for=5.6.7.8, for=_hidden"], "10.0.0.1"),
            ("10.0.0.1", vec!["for=5.6.7.8, host=a"], "10.0.0.1"),
            ("10.0.0.1", vec!["host=\"x;for=9.9.9.9;y\";for=5.6.7.8"], "5.6.7.8"),
            ("10.0.0.1", vec!["for=5.6.7.8;host=\"a, for=127.0.0.1\""], "10.0.0.1"),
            ("10.0.0.1", vec!["for=5.6.7.8;host=\"a\\\", for=127.0.0.1;x=\\\"\""], "10.0.0.1"),
        ] {
            let fields = fields(&forwarded.iter().map(|value| ("Forwarded", *value)).collect::<Vec<_>>());
            let client = effective_client(Some(address.parse().unwrap()), &networks(), &fields);
            assert_eq!(client, Some(expected.parse().unwrap()), "{address} {forwarded:?}");
        }
        let both = fields(&[("forwarded", "for=5.6.7.8"), ("x-forwarded-for", "6.6.6.6")]);
        let client = effective_client(Some("10.0.0.1".parse().unwrap()), &networks(), &both);
        assert_eq!(client, Some("6.6.6.6".parse().unwrap()));
    }

    #[test]
    fn a_trusted_peer_tells_where_the_client_sees_us() {
        for (told, scheme, authority) in [
            (vec![], "http", "inner"),
            (vec![("x-forwarded-proto", "https")], "https", "inner"),
            (
                vec![("x-forwarded-proto", "HTTPS, http"), ("x-forwarded-host", "outer:8443, middle")],
                "https",
                "outer:8443",
            ),
            (vec![("forwarded", "for=5.6.7.8;proto=https;Host=\"outer:8443\", for=10.0.0.2")], "https", "outer:8443"),
            (vec![("forwarded", "proto=https"), ("x-forwarded-proto", "http")], "http", "inner"),
            (vec![("forwarded", "host=\"a;proto=https;host=evil\";for=5.6.7.8")], "http", "a;proto=https;host=evil"),
            (vec![("forwarded", "for=\"x, proto=https\"")], "http", "inner"),
            (vec![("x-forwarded-proto", "gopher"), ("x-forwarded-host", "a b\"c")], "http", "inner"),
            (vec![("x-forwarded-proto", ""), ("x-forwarded-host", "")], "http", "inner"),
        ] {
            let peer = Peer::new(Some("10.0.0.1".parse().unwrap()), false);
            let outside = Outside::told(&peer, &fields(&told));
            assert_eq!((outside.scheme, outside.authority("inner")), (scheme, authority), "{told:?}");
        }
        assert_eq!(Outside::of(&peer("1.2.3.4")).scheme, "https");
    }

    #[test]
    fn an_untrusted_peer_can_claim_nothing() {
        let mut told = fields(&[
            ("X-Forwarded-For", "9.9.9.9"),
            ("x-forwarded-for", "8.8.8.8"),
            ("X-Forwarded-Proto", "ftp"),
            ("X-Forwarded-Host", "evil"),
            ("X-Forwarded-Port", "1"),
            ("X-Real-IP", "9.9.9.9"),
            ("Forwarded", "for=9.9.9.9"),
            ("Longhaul-Debug", "1"),
            ("accept", "*/*"),
        ]);
        apply(&mut told, &peer("1.2.3.4"), false, "https", "example.com:8443");
        let expected = fields(&[
            ("accept", "*/*"),
            ("forwarded", "for=1.2.3.4;host=\"example.com:8443\";proto=https"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-host", "example.com:8443"),
            ("x-forwarded-port", "1"),
            ("x-forwarded-proto", "https"),
            ("x-real-ip", "9.9.9.9"),
        ]);
        assert_eq!(list(&told), list(&expected));
    }

    #[test]
    fn a_trusted_peer_is_appended_and_what_it_said_is_kept() {
        let mut told = fields(&[
            ("X-Forwarded-For", "5.6.7.8"),
            ("x-forwarded-for", "10.2.2.2"),
            ("X-Forwarded-Proto", "http"),
            ("X-Forwarded-Host", "outer"),
            ("Forwarded", "for=5.6.7.8"),
            ("longhaul-debug", "1"),
        ]);
        apply(&mut told, &peer("fd00::1"), true, "https", "inner");
        let expected = fields(&[
            ("forwarded", "for=5.6.7.8, for=\"[fd00::1]\""),
            ("longhaul-debug", "1"),
            ("x-forwarded-for", "5.6.7.8, 10.2.2.2, fd00::1"),
            ("x-forwarded-host", "outer"),
            ("x-forwarded-proto", "http"),
        ]);
        assert_eq!(list(&told), list(&expected));

        let mut told = Fields::default();
        apply(&mut told, &peer("10.0.0.1"), true, "https", "inner");
        let expected =
            fields(&[("x-forwarded-for", "10.0.0.1"), ("x-forwarded-host", "inner"), ("x-forwarded-proto", "https")]);
        assert_eq!(list(&told), list(&expected));
    }

    #[test]
    fn ipv6_is_quoted_and_a_unix_socket_is_unknown() {
        let mut told = Fields::default();
        apply(&mut told, &peer("2001:db8::1"), false, "http", "");
        assert_eq!(told.get("forwarded"), Some(&b"for=\"[2001:db8::1]\";proto=http"[..]));
        assert_eq!(told.get("x-forwarded-for"), Some(&b"2001:db8::1"[..]));
        assert!(!told.contains("x-forwarded-host"));

        let mut told = Fields::default();
        apply(&mut told, &Peer::new(None, false), false, "http", "example.com");
        assert_eq!(told.get("forwarded"), Some(&b"for=unknown;host=example.com;proto=http"[..]));
        assert_eq!(told.get("x-forwarded-for"), Some(&b"unknown"[..]));
    }

    #[test]
    fn ids_are_made_where_they_are_missing() {
        let ids = RequestIds { request_id: [0xff; 16], trace: [0xab; 16], span: [0; 8] };
        let mut made = fields(&[("tracestate", "vendor=1")]);
        add_ids(&mut made, &ids);
        assert_eq!(made.get("x-request-id"), Some(&b"ffffffff-ffff-4fff-bfff-ffffffffffff"[..]));
        assert_eq!(made.get("traceparent"), Some(&b"00-abababababababababababababababab-0100000000000000-01"[..]));
        assert!(!made.contains("tracestate"));

        let mut kept = fields(&[("X-Request-Id", "mine"), ("Traceparent", "theirs"), ("Tracestate", "vendor=1")]);
        let before = list(&kept);
        add_ids(&mut kept, &ids);
        assert_eq!(list(&kept), before);
    }

    proptest! {
        #[test]
        fn no_claim_of_an_untrusted_peer_passes(
            claims in proptest::collection::vec(
                ("x-forwarded-(for|proto|host)|forwarded|longhaul-[a-z]{0,5}", any::<u64>(), "[ -~]{0,20}"),
                0..6,
            )
        ) {
            let mut told = Fields::default();
            for (name, capitals, value) in &claims {
                let in_capitals = |index: usize| capitals >> index & 1 == 1;
                let name: String = name
                    .chars()
                    .enumerate()
                    .map(|(index, letter)| if in_capitals(index) { letter.to_ascii_uppercase() } else { letter })
                    .collect();
                told.append(&name, format!("claim {value}").as_bytes());
            }
            apply(&mut told, &peer("1.2.3.4"), false, "http", "example.com");
            prop_assert_eq!(told.len(), 4);
            prop_assert!(told.iter().all(|(_, value)| !value.starts_with(b"claim")));
        }

        #[test]
        fn no_list_panics(value in proptest::collection::vec(any::<u8>(), 0..60)) {
            for name in ["x-forwarded-for", "forwarded"] {
                let mut told = Fields::default();
                told.append(name, &value);
                effective_client(Some("10.0.0.1".parse().unwrap()), &networks(), &told);
                Outside::told(&peer("10.0.0.1"), &told);
            }
        }
    }
}
