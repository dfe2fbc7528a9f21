//! DNS: a name server on a loopback port, over UDP and TCP, whose every answer a test decides.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

/// Answers longer than this come over TCP only.
const UDP_BYTES_MAX: usize = 1232;

const A: u16 = 1;
const AAAA: u16 = 28;
const SRV: u16 = 33;

/// How a name is answered for.
#[derive(Clone)]
enum Name {
    /// By type: the data of the records, and their TTL.
    Records(HashMap<u16, Vec<Vec<u8>>>, u32),
    /// With this response code.
    Code(u8),
    /// Not at all.
    Silence,
}

/// One SRV record.
pub struct Srv<'a> {
    pub priority: u16,
    pub weight: u16,
    pub port: u16,
    pub target: &'a str,
}

#[derive(Default)]
struct Zone {
    names: HashMap<String, Name>,
    questions: Vec<(String, u16)>,
}

/// Names that it was told nothing of do not exist. Dropping it ends it.
pub struct NameServer {
    pub address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl NameServer {
    pub async fn start() -> NameServer {
        let zone = Arc::new(Mutex::new(Zone::default()));
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
            // The same port for both; somebody else may have it.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().expect("bound")).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().expect("bound");
        let tasks = [tokio::spawn(serve_udp(udp, Arc::clone(&zone))), tokio::spawn(serve_tcp(tcp, Arc::clone(&zone)))];
        NameServer { address, zone, tasks }
    }

    /// The name has these addresses, and no other records. None: it is there without any.
    pub fn addresses(&self, name: &str, ttl: u32, addresses: &[&str]) {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().expect("an address")).collect();
        let mut records: HashMap<u16, Vec<Vec<u8>>> = HashMap::new();
        for address in addresses {
            let (kind, data) = match address {
                IpAddr::V4(address) => (A, address.octets().to_vec()),
                IpAddr::V6(address) => (AAAA, address.octets().to_vec()),
            };
            records.entry(kind).or_default().push(data);
        }
        self.set(name, Name::Records(records, ttl));
    }

    pub fn services(&self, name: &str, ttl: u32, services: &[Srv<'_>]) {
        let record = |service: &Srv<'_>| {
            let mut data = [service.priority, service.weight, service.port].map(u16::to_be_bytes).concat();
            write_name(service.target, &mut data);
            data
        };
        self.set(name, Name::Records(HashMap::from([(SRV, services.iter().map(record).collect())]), ttl));
    }

    /// Answers with this code (2: SERVFAIL, 3: NXDOMAIN, 5: REFUSED).
    pub fn code(&self, name: &str, code: u8) {
        self.set(name, Name::Code(code));
    }

    pub fn silence(&self, name: &str) {
        self.set(name, Name::Silence);
    }

    /// How many times the name was asked for.
    pub fn questions(&self, name: &str) -> usize {
        self.zone.lock().unwrap().questions.iter().filter(|(asked, _)| asked == name).count()
    }

    fn set(&self, name: &str, answer: Name) {
        self.zone.lock().unwrap().names.insert(name.to_owned(), answer);
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn serve_udp(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 4096];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
        let Some(mut answer) = answer(&buffer[..length], &zone) else { continue };
        if answer.len() > UDP_BYTES_MAX {
            // TC, and nothing but the question.
            answer.truncate(question_end(&answer));
            answer[2] |= 2;
            answer[6..8].copy_from_slice(&[0, 0]);
        }
        let _ = socket.send_to(&answer, peer).await;
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<Mutex<Zone>>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let zone = Arc::clone(&zone);
        tokio::spawn(async move {
            while let Ok(length) = stream.read_u16().await {
                let mut question = vec![0; length.into()];
                if stream.read_exact(&mut question).await.is_err() {
                    return;
                }
                let Some(answer) = answer(&question, &zone) else { continue };
                let length = u16::try_from(answer.len()).expect("fits");
                if stream.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await.is_err() {
                    return;
                }
            }
        });
    }
}

fn answer(question: &[u8], zone: &Mutex<Zone>) -> Option<Vec<u8>> {
    let end = question_end(question);
    let mut labels = Vec::new();
    let mut at = 12;
    while question[at] != 0 {
        let length = usize::from(question[at]);
        labels.push(String::from_utf8_lossy(&question[at + 1..at + 1 + length]).to_ascii_lowercase());
        at += length + 1;
    }
    let name = labels.join(".");
    let kind = u16::from_be_bytes([question[end - 4], question[end - 3]]);
    let mut zone = zone.lock().unwrap();
    zone.questions.push((name.clone(), kind));
    let none = HashMap::new();
    let (code, records, ttl) = match zone.names.get(&name) {
        Some(Name::Silence) => return None,
        Some(Name::Code(code)) => (*code, &none, 0),
        Some(Name::Records(records, ttl)) => (0, records, *ttl),
        None => (3, &none, 0),
    };
    let records = records.get(&kind).map(Vec::as_slice).unwrap_or_default();
    let count = u16::try_from(records.len()).expect("fits").to_be_bytes();
    let mut answer = question[..2].to_vec();
    // QR, AA, RD and RA.
    answer.extend([0x85, 0x80 | code, 0, 1, count[0], count[1], 0, 0, 0, 0]);
    answer.extend(&question[12..end]);
    for data in records {
        answer.extend([0xc0, 12]);
        answer.extend(kind.to_be_bytes());
        answer.extend(1u16.to_be_bytes());
        answer.extend(ttl.to_be_bytes());
        answer.extend(u16::try_from(data.len()).expect("fits").to_be_bytes());
        answer.extend(data);
    }
    Some(answer)
}

/// Where the (only) question of a message ends.
fn question_end(message: &[u8]) -> usize {
    let mut at = 12;
    while message[at] != 0 {
        at += usize::from(message[at]) + 1;
    }
    at + 5
}

fn write_name(name: &str, into: &mut Vec<u8>) {
    for label in name.trim_end_matches('.').split('.').filter(|label| !label.is_empty()) {
        into.push(u8::try_from(label.len()).expect("short"));
        into.extend(label.as_bytes());
    }
    into.push(0);
}
