//! As much of HTTP/1.1 as the clients need: replies with a `Content-Length`.

use bytes::{Buf as _, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use super::{Outcome, PIECE};

/// Whom to ask, and as whom.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) address: &'a str,
    pub(crate) key: &'a str,
}

impl Target<'_> {
    /// A request's first lines, without the empty one that ends them.
    pub(crate) fn head(&self, method: &str, path: &str) -> String {
        let Self { address, key } = self;
        format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\n")
    }
}

/// One connection.
pub(crate) struct Client {
    pub(crate) socket: TcpStream,
    /// What came and was not read yet.
    came: BytesMut,
}

impl Client {
    pub(crate) async fn connect(address: &str) -> Outcome<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, came: BytesMut::with_capacity(PIECE) })
    }

    /// The body of the reply.
    pub(crate) async fn reply(&mut self) -> Outcome<Vec<u8>> {
        let length = self.head().await?.ok_or("a reply without a length")?;
        while self.came.len() < length {
            self.more().await?;
        }
        Ok(self.came.split_to(length).to_vec())
    }

    /// Reads the reply's body and forgets it; says how long it was.
    pub(crate) async fn skip_reply(&mut self) -> Outcome<usize> {
        let length = self.head().await?.ok_or("a reply without a length")?;
        self.skip(length).await?;
        Ok(length)
    }

    /// Reads the lines before the body; the body's length, unless it comes in chunks.
    pub(crate) async fn head(&mut self) -> Outcome<Option<usize>> {
        let end = loop {
            match self.came.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(end) => break end,
                None => self.more().await?,
            }
        };
        let head = self.came.split_to(end + 4);
        let head = std::str::from_utf8(&head)?;
        if head.split(' ').nth(1) != Some("200") {
            return Err(head.to_owned().into());
        }
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse())
        });
        Ok(length.transpose()?)
    }

    /// The next line of a body that comes in chunks, the lines of their sizes among them.
    pub(crate) async fn line(&mut self) -> Outcome<BytesMut> {
        loop {
            match self.came.iter().position(|&byte| byte == b'\n') {
                Some(end) => return Ok(self.came.split_to(end + 1)),
                None => self.more().await?,
            }
        }
    }

    async fn skip(&mut self, length: usize) -> Outcome<()> {
        let mut left = length;
        loop {
            let here = self.came.len().min(left);
            self.came.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> Outcome<()> {
        self.came.reserve(PIECE);
        match self.socket.read_buf(&mut self.came).await? {
            0 => Err("the server hung up".into()),
            _ => Ok(()),
        }
    }
}
