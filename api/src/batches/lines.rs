//! The lines of a stored file, one at a time.

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;
use futures::stream::BoxStream;
use tunesmith_store::StoreError;

/// A longer line is cut here, which makes it a line that is no JSON.
const MAX_LINE: usize = 8 << 20;
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads lines out of pieces.
pub(super) struct Lines {
    pieces: BoxStream<'static, Result<Bytes, StoreError>>,
    buffer: BytesMut,
    number: u64,
    ended: bool,
}

impl Lines {
    pub(super) fn new(pieces: BoxStream<'static, Result<Bytes, StoreError>>) -> Self {
        Self { pieces, buffer: BytesMut::new(), number: 0, ended: false }
    }

    /// The next line without its end, and its number from 1.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, StoreError> {
        let mut searched = 0;
        loop {
            let found = self.buffer[searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = found.map(|at| searched + at) {
                let mut line = self.buffer.split_to(end + 1);
                line.truncate(end);
                return Ok(Some(self.numbered(line)));
            }
            if self.ended {
                let rest = std::mem::take(&mut self.buffer);
                return Ok((!rest.is_empty()).then(|| self.numbered(rest)));
            }
            searched = self.buffer.len();
            match self.pieces.try_next().await? {
                None => self.ended = true,
                // The rest of a line that is too long is dropped up to its end.
                Some(piece) if self.buffer.len() > MAX_LINE => {
                    if let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
                        self.buffer.extend_from_slice(&piece[end..]);
                    }
                }
                Some(piece) => self.buffer.extend_from_slice(&piece),
            }
        }
    }

    fn numbered(&mut self, line: BytesMut) -> (u64, Bytes) {
        self.number += 1;
        let mut line = line.freeze();
        if self.number == 1 && line.starts_with(BOM) {
            line = line.slice(BOM.len()..);
        }
        (self.number, line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;

    async fn read(pieces: &[&'static [u8]]) -> Vec<(u64, Bytes)> {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
        let mut lines = Lines::new(futures::stream::iter(pieces).boxed());
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.expect("no store") {
            found.push(line);
        }
        found
    }

    #[tokio::test]
    async fn lines_are_whole_however_they_are_cut_into_pieces() {
        let expected: Vec<(u64, Bytes)> =
            [(1, "ab"), (2, ""), (3, "c\r"), (4, "d")].map(|(n, line)| (n, line.into())).into();
        for pieces in [
            vec![&b"ab\n\nc\r\nd"[..]],
            vec![b"\xef\xbb\xbfa", b"b", b"\n", b"\nc", b"\r", b"\n", b"d\n"],
        ] {
            assert_eq!(read(&pieces).await, expected);
        }
        assert_eq!(read(&[]).await, []);
    }
}
