//! A control connection that breaks is resumed over another one, and no message is lost, doubled or reordered.
//!
//! Each side counts the messages that it receives, and keeps those that it has sent until the other side confirms them
//! ([`Control::Received`](crate::wire::control::Control::Received)). Over a new connection both sides say how many they
//! have received, and send the rest again. Nothing survives the end of a process: what it had received it may not have
//! dealt with.

use std::collections::VecDeque;

/// This many bytes of messages may be unconfirmed. With more of them the connection cannot be resumed any more: the sender
/// neither waits nor takes more memory.
pub const MAX_UNCONFIRMED_BYTES: usize = 16 << 20;
/// A confirmation is due after this many bytes.
const CONFIRM_BYTES: usize = 256 << 10;
/// A confirmation is due after this many messages.
const CONFIRM_MESSAGES: u64 = 16;

/// The state of one side.
#[derive(Debug, Default)]
pub struct Resumption {
    /// The messages that the other side has not confirmed, oldest first.
    unconfirmed: VecDeque<Vec<u8>>,
    unconfirmed_bytes: usize,
    /// The number of messages that the other side has confirmed.
    confirmed: u64,
    /// The number of messages that were received.
    received: u64,
    /// The number of messages that were received when the other side was last told, and their bytes since.
    told: u64,
    untold_bytes: usize,
    /// Messages were forgotten that the other side may need again.
    is_forgetful: bool,
}

/// The connection cannot be resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumptionError {
    /// The other side confirms a message that it confirmed before and is gone, or that was never sent.
    #[error("the other side has received {found} messages, it says, of {confirmed} to {sent}")]
    Count {
        /// The number that the other side says.
        found: u64,
        /// The number that it confirmed before.
        confirmed: u64,
        /// The number of messages that were sent.
        sent: u64,
    },
    /// There were too many bytes to keep.
    #[error(
        "more than {MAX_UNCONFIRMED_BYTES} bytes of messages had not been confirmed when the connection broke"
    )]
    Forgotten,
}

impl Resumption {
    /// Keeps a message that is about to be sent. `bytes` is the encoded message.
    pub fn send(&mut self, bytes: Vec<u8>) {
        self.unconfirmed_bytes += bytes.len();
        self.unconfirmed.push_back(bytes);
        while self.unconfirmed_bytes > MAX_UNCONFIRMED_BYTES {
            self.is_forgetful = true;
            self.confirm_one();
        }
    }

    /// Counts a message of so many bytes that was received. Returns how many there were, if the other side is to be told
    /// now.
    pub fn receive(&mut self, bytes: usize) -> Option<u64> {
        self.received += 1;
        self.untold_bytes += bytes;
        let due = self.received - self.told >= CONFIRM_MESSAGES || self.untold_bytes >= CONFIRM_BYTES;
        due.then(|| self.tell())
    }

    /// Returns how many messages were received, to tell the other side.
    pub fn tell(&mut self) -> u64 {
        (self.told, self.untold_bytes) = (self.received, 0);
        self.received
    }

    /// Forgets the messages that the other side has received, which says that it has received `count` in all.
    ///
    /// # Errors
    ///
    /// Fails if that cannot be.
    pub fn confirm(&mut self, count: u64) -> Result<(), ResumptionError> {
        let sent = self.confirmed + self.unconfirmed.len() as u64;
        // What was forgotten counts as confirmed.
        if count > sent || count < self.confirmed && !self.is_forgetful {
            return Err(ResumptionError::Count { found: count, confirmed: self.confirmed, sent });
        }
        while self.confirmed < count {
            self.confirm_one();
        }
        Ok(())
    }

    /// Returns the messages to send again over a new connection, after the other side has said that it has received
    /// `count` in all.
    ///
    /// # Errors
    ///
    /// Fails if that cannot be, or if some of these messages are gone.
    pub fn resume(&mut self, count: u64) -> Result<Vec<Vec<u8>>, ResumptionError> {
        if count < self.confirmed && self.is_forgetful {
            return Err(ResumptionError::Forgotten);
        }
        self.confirm(count)?;
        Ok(self.unconfirmed.iter().cloned().collect())
    }

    fn confirm_one(&mut self) {
        if let Some(bytes) = self.unconfirmed.pop_front() {
            self.unconfirmed_bytes -= bytes.len();
            self.confirmed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message of two bytes.
    fn message(number: u16) -> Vec<u8> {
        number.to_le_bytes().to_vec()
    }

    proptest! {
        /// However often the connection breaks, and whatever is on its way then, everything comes once and in order.
        #[test]
        fn nothing_is_lost_or_doubled(breaks in prop::collection::vec((1usize..40, 0usize..40, any::<bool>()), 1..20)) {
            let (mut sender, mut receiver) = (Resumption::default(), Resumption::default());
            let (mut number, mut came) = (0u16, Vec::new());
            let mut wire = VecDeque::new();
            for (sent, arrive, confirmation_arrives) in breaks {
                for _ in 0..sent {
                    sender.send(message(number));
                    wire.push_back(message(number));
                    number += 1;
                }
                for _ in 0..arrive.min(wire.len()) {
                    let bytes = wire.pop_front().unwrap();
                    came.push(u16::from_le_bytes(bytes.clone().try_into().unwrap()));
                    if let Some(count) = receiver.receive(bytes.len()) && confirmation_arrives {
                        sender.confirm(count).unwrap();
                    }
                }
                // The connection breaks, and another one takes its place.
                wire = sender.resume(receiver.tell()).unwrap().into();
            }
            while let Some(bytes) = wire.pop_front() {
                came.push(u16::from_le_bytes(bytes.try_into().unwrap()));
            }
            prop_assert!(came.into_iter().eq(0..number));
        }

        #[test]
        fn whatever_the_other_side_confirms_is_checked(counts in prop::collection::vec(any::<u64>(), 0..20)) {
            let mut side = Resumption::default();
            side.send(message(1));
            for count in counts {
                prop_assert_eq!(side.confirm(count).is_ok(), count <= 1 && count >= side.confirmed);
            }
        }
    }

    #[test]
    fn what_is_confirmed_takes_no_memory() {
        let (mut sender, mut receiver) = (Resumption::default(), Resumption::default());
        for _ in 0..1000 {
            sender.send(vec![0; 100 << 10]);
            if let Some(count) = receiver.receive(100 << 10) {
                sender.confirm(count).unwrap();
            }
        }
        assert!(sender.unconfirmed_bytes <= CONFIRM_BYTES + (100 << 10));
        assert!(sender.resume(receiver.tell()).unwrap().len() < 3);
    }

    #[test]
    fn what_is_too_much_to_keep_cannot_be_sent_again() {
        let mut side = Resumption::default();
        for _ in 0..20 {
            side.send(vec![0; 1 << 20]);
        }
        assert!(side.unconfirmed_bytes <= MAX_UNCONFIRMED_BYTES);
        assert_eq!(side.resume(2), Err(ResumptionError::Forgotten));
        // The other side had received what was forgotten after all.
        assert_eq!(side.resume(10).unwrap().len(), 10);
    }
}
