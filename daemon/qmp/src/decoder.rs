//! [`Decoder`]: messages from bytes.

use std::mem;

use memlane_protocol::wire::plain;

use crate::message::Message;

/// Longest line that QEMU may send, in bytes: long lists of devices have some ten thousand.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// Characters of a line that are shown if it cannot be read.
const SHOWN: usize = 80;

/// The bytes that QEMU has sent on one connection, from which messages are taken.
#[derive(Debug, Default)]
pub struct Decoder {
    received: Vec<u8>,
    /// The number of these bytes that hold no end of a line.
    searched: usize,
}

/// The reason why bytes are no message. Nothing that follows them can be trusted, so the connection should be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A line does not end.
    #[error("it sends a line of more than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// A line is something else than JSON.
    #[error("it says {line:?}, which is not JSON")]
    NotJson {
        /// The beginning of the line, as plain text.
        line: String,
    },
}

impl Decoder {
    /// Adds bytes that were received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// Returns the next message; `None` if the rest of its line has not been received yet.
    ///
    /// # Errors
    ///
    /// If a line is longer than [`MAX_LINE_BYTES`], or is not JSON.
    pub fn next_message(&mut self) -> Result<Option<Message>, DecodeError> {
        let end = self.received[self.searched..].iter().position(|byte| *byte == b'\n');
        let length = end.map_or(self.received.len(), |end| self.searched + end + 1);
        if length > MAX_LINE_BYTES {
            return Err(DecodeError::TooLong);
        }
        if end.is_none() {
            self.searched = length;
            return Ok(None);
        }
        let rest = self.received.split_off(length);
        let line = mem::replace(&mut self.received, rest);
        self.searched = 0;
        match serde_json::from_slice(&line) {
            Ok(line) => Ok(Some(Message::of(line))),
            Err(_) => Err(DecodeError::NotJson { line: shown(&line) }),
        }
    }
}

fn shown(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    let shown: String = line.trim_end().chars().take(SHOWN).collect();
    plain(&shown).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::message::Answer;

    fn answer(id: u64) -> Message {
        Message::Answer(Answer { id: Some(id), outcome: Ok(json!({})) })
    }

    #[test]
    fn lines_may_come_in_any_pieces() {
        const LINES: &[u8] = b"{\"return\": {}, \"id\": 1}\r\n{\"return\": {}, \"id\": 2}\n{\"ret";
        for size in 1..=LINES.len() {
            let mut decoder = Decoder::default();
            let mut messages = Vec::new();
            for piece in LINES.chunks(size) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message().expect("JSON") {
                    messages.push(message);
                }
            }
            assert_eq!(messages, [answer(1), answer(2)], "in pieces of {size}");
        }
    }

    #[test]
    fn a_line_that_does_not_end_is_refused() {
        let mut decoder = Decoder::default();
        let line = format!("{{\"return\": {:?}}}", " ".repeat(MAX_LINE_BYTES));
        let (within, beyond) = line.split_at(MAX_LINE_BYTES);
        decoder.push(within.as_bytes());
        assert_eq!(decoder.next_message(), Ok(None));
        decoder.push(beyond.as_bytes());
        assert_eq!(decoder.next_message(), Err(DecodeError::TooLong));
        decoder.push(b"\n");
        assert_eq!(decoder.next_message(), Err(DecodeError::TooLong));
    }

    #[test]
    fn what_is_not_json_is_shown() {
        let mut decoder = Decoder::default();
        decoder.push(b"QEMU 10.0.2 monitor\x1b[2J - type 'help'\r\n(qemu) ");
        let error = decoder.next_message().expect_err("no JSON").to_string();
        assert_eq!(error, "it says \"QEMU 10.0.2 monitor\u{fffd}[2J - type 'help'\", which is not JSON");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(pieces in prop::collection::vec(any::<Vec<u8>>(), 0..8)) {
            let mut decoder = Decoder::default();
            for piece in pieces {
                decoder.push(&piece);
                while let Ok(Some(_)) = decoder.next_message() {}
            }
        }
    }
}
