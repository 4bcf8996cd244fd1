//! Identities as text.

use memlane_protocol::wire::attach::MigrationId;

/// 32 hexadecimal digits.
pub fn encode(id: &MigrationId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads what [`encode`] wrote.
pub fn decode(text: &str) -> Option<MigrationId> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    (text.len() == 32).then(|| bytes.try_into().ok()).flatten()
}

#[cfg(test)]
mod tests {
    #[test]
    fn goes_there_and_back() {
        let id = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(super::decode(&super::encode(&id)), Some(id));
        for bad in ["", "00", &"g".repeat(32), &"0".repeat(34)] {
            assert_eq!(super::decode(bad), None);
        }
    }
}
