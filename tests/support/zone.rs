//! Zone: a small name server, for proxies that look for each other.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::net::UdpSocket;
use tokio::task::AbortHandle;

/// Answers over UDP until it is dropped. A name it does not know does not exist; with [`ZoneServer::fail`] nothing is known
/// (SERVFAIL).
pub struct ZoneServer {
    pub address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    task: AbortHandle,
}

#[derive(Default)]
struct Zone {
    addresses: HashMap<String, Vec<Ipv4Addr>>,
    fails: bool,
}

impl ZoneServer {
    pub async fn start() -> ZoneServer {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("bound");
        let zone = Arc::<Mutex<Zone>>::default();
        let task = tokio::spawn(serve(socket, Arc::clone(&zone))).abort_handle();
        ZoneServer { address, zone, task }
    }

    /// From here on the name has these addresses.
    pub fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        self.zone.lock().expect("not poisoned").addresses.insert(name.to_owned(), addresses.to_vec());
    }

    pub fn fail(&self, fails: bool) {
        self.zone.lock().expect("not poisoned").fails = fails;
    }
}

impl Drop for ZoneServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let answer = answer(&buffer[..length], &zone.lock().expect("not poisoned"));
        // A client that has gone is no failure of the server.
        let _ = socket.send_to(&answer, from).await;
    }
}

/// RFC 1035 section 4: one question, A records for it.
fn answer(query: &[u8], zone: &Zone) -> Vec<u8> {
    let mut name = Vec::new();
    let mut position = 12;
    while query[position] != 0 {
        let length = usize::from(query[position]);
        name.push(String::from_utf8_lossy(&query[position + 1..=position + length]).to_lowercase());
        position += length + 1;
    }
    let end = position + 5;
    let is_a = query[position + 1..position + 3] == [0, 1];
    let known = zone.addresses.get(&name.join("."));
    let code = match known {
        _ if zone.fails => 2,
        None => 3,
        Some(_) => 0,
    };
    let records = known.filter(|_| is_a && code == 0).map(Vec::as_slice).unwrap_or_default();
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, u8::try_from(records.len()).expect("few"), 0, 0, 0, 0]);
    answer.extend(&query[12..end]);
    for record in records {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        answer.extend(record.octets());
    }
    answer
}
