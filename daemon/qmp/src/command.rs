//! [`Commands`]: what a client says.

use serde_json::{Value, json};

/// The command that ends the negotiation of capabilities: QEMU refuses all others before it.
pub const NEGOTIATE: &str = "qmp_capabilities";

/// The commands of one connection, each of which has a number of its own.
#[derive(Debug, Default)]
pub struct Commands {
    last_id: u64,
}

impl Commands {
    /// Returns the number of a new command, and the line that gives it to QEMU.
    pub fn encode(&mut self, command: &str, arguments: &Value) -> (u64, String) {
        self.last_id += 1;
        let line = json!({ "execute": command, "arguments": arguments, "id": self.last_id });
        (self.last_id, format!("{line}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_a_line_with_a_number_of_its_own() {
        let mut commands = Commands::default();
        let (first, line) = commands.encode("getfd", &json!({ "fdname": "a\nb" }));
        assert_eq!(line.find('\n'), Some(line.len() - 1), "{line:?}");
        let command: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(command, json!({ "execute": "getfd", "arguments": { "fdname": "a\nb" }, "id": first }));
        assert_ne!(commands.encode(NEGOTIATE, &json!({})).0, first);
    }
}
