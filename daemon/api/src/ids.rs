//! Identities of migrations: 128 random bits, shown as 32 hexadecimal digits.

use memlane_protocol::wire::attach::MigrationId;
use uuid::Uuid;

/// Makes a new, unique identity: a UUID of version 4, of which 122 bits are random.
///
/// # Panics
///
/// Panics if the kernel gives no random bytes (`getrandom(2)`), as it always does once it has booted.
pub fn random() -> MigrationId {
    Uuid::new_v4().into_bytes()
}

/// Writes an identity, or any other number of 128 bits, as 32 hexadecimal digits.
pub fn encode(id: &MigrationId) -> String {
    Uuid::from_bytes(*id).simple().to_string()
}

/// Reads an identity that [`encode`] wrote; returns `None` for any other text.
pub fn decode(text: &str) -> Option<MigrationId> {
    // The other forms that the library reads are longer.
    (text.len() == 32).then(|| Uuid::try_parse(text).ok().map(Uuid::into_bytes)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let id = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(decode(&encode(&id)), Some(id));
        assert_eq!(encode(&id), "00112233445566778899aabbccddeeff");
        for bad in ["", "00", &"g".repeat(32), &"0".repeat(34), "00112233-4455-6677-8899-aabbccddeeff"] {
            assert_eq!(decode(bad), None);
        }
    }

    #[test]
    fn no_identity_is_made_twice() {
        let made: std::collections::BTreeSet<_> = (0..1000).map(|_| random()).collect();
        assert_eq!(made.len(), 1000);
    }
}
