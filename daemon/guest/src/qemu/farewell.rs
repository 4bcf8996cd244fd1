//! How a QEMU says that it comes to its end.

use serde_json::Value;

use crate::Farewell;

/// Reads the data of the event SHUTDOWN.
pub(super) fn of(data: &Value) -> Farewell {
    match (data["guest"] == true, data["reason"].as_str().unwrap_or("an unknown reason")) {
        (true, "guest-shutdown") => Farewell::PoweredOff("powered off"),
        // QEMU was told to end then (-no-reboot).
        (true, "guest-reset") => Farewell::PoweredOff("rebooted, which ends its QEMU,"),
        (_, "guest-panic") => Farewell::Other("the guest panicked, and its QEMU ended".to_owned()),
        (_, "host-qmp-quit") => Farewell::Other("QEMU was told to quit by another program".to_owned()),
        (_, "host-signal") => Farewell::Other("QEMU was ended by a signal".to_owned()),
        (_, reason) => Farewell::Other(format!("QEMU ended ({reason})")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_guest_that_shut_itself_down_is_powered_off() {
        let said = |guest: bool, reason: &str| of(&json!({ "guest": guest, "reason": reason }));
        assert_eq!(said(true, "guest-shutdown"), Farewell::PoweredOff("powered off"));
        for (guest, reason, words) in [
            (true, "guest-panic", "panicked"),
            (false, "host-signal", "signal"),
            (false, "host-qmp-quit", "told to quit"),
            (false, "guest-shutdown", "guest-shutdown"),
        ] {
            let Farewell::Other(how) = said(guest, reason) else { panic!("{reason}") };
            assert!(how.contains(words), "{how}");
        }
        assert!(matches!(of(&Value::Null), Farewell::Other(_)));
    }
}
