//! Wire: HTTP/1.1 over a simulated socket, as far as agents and clients here speak it.

use std::io;

use longhaul::net::simulated::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A head and what has come behind it already.
pub struct Head {
    /// The first line.
    pub line: String,
    fields: Vec<(String, String)>,
}

impl Head {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.field(name)?.parse().ok()
    }

    fn parse(text: &str) -> Head {
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap_or_default().to_owned();
        let fields = lines.filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        });
        Head { line, fields: fields.collect() }
    }
}

/// A connection with what was read of it and not used.
pub struct Wire {
    pub stream: Stream,
    unread: Vec<u8>,
}

/// How a body ended.
pub enum Ending {
    Whole(Vec<u8>),
    /// Before its end, and that can be seen.
    Cut(Vec<u8>),
}

impl Wire {
    pub fn new(stream: Stream) -> Wire {
        Wire { stream, unread: Vec::new() }
    }

    /// `None`: the other side has closed, between two messages or within one.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(end) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&self.unread[..end]).into_owned();
                self.unread.drain(..end + 4);
                return Ok(Some(Head::parse(&text)));
            }
            if self.more().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// The body that belongs to a head.
    pub async fn body(&mut self, head: &Head) -> Ending {
        let mut body = Vec::new();
        match self.read_body(head, &mut body).await {
            Ok(true) => Ending::Whole(body),
            Ok(false) | Err(_) => Ending::Cut(body),
        }
    }

    async fn read_body(&mut self, head: &Head, body: &mut Vec<u8>) -> io::Result<bool> {
        if head.field("transfer-encoding").is_none() {
            let length = head.number("content-length").unwrap_or(0) as usize;
            return self.exactly(length, body).await;
        }
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                if !self.exactly(1, &mut line).await? {
                    return Ok(false);
                }
            }
            let line = String::from_utf8_lossy(&line[..line.len() - 2]).into_owned();
            let length = usize::from_str_radix(line.split(';').next().unwrap_or_default(), 16)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{line:?} begins no chunk")))?;
            let mut end = Vec::new();
            if !self.exactly(length, body).await? || !self.exactly(2, &mut end).await? {
                return Ok(false);
            }
            if length == 0 {
                return Ok(true);
            }
        }
    }

    async fn exactly(&mut self, length: usize, into: &mut Vec<u8>) -> io::Result<bool> {
        let mut left = length;
        loop {
            let taken = left.min(self.unread.len());
            into.extend(self.unread.drain(..taken));
            left -= taken;
            if left == 0 {
                return Ok(true);
            }
            if self.more().await? == 0 {
                return Ok(false);
            }
        }
    }

    async fn more(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 2048];
        let count = self.stream.read(&mut buffer).await?;
        self.unread.extend_from_slice(&buffer[..count]);
        Ok(count)
    }

    pub async fn write(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(text.as_bytes()).await
    }

    /// Returns when the other side has left; what it sends is kept.
    pub async fn left(&mut self) {
        while matches!(self.more().await, Ok(1..)) {}
    }
}
