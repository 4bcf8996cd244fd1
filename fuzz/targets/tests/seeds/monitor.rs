//! What QEMU says on its monitor.

use super::{Seeds, named};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;
const STOP: &str = r#"{"timestamp": {"seconds": 1800000000, "microseconds": 250000}, "event": "STOP"}"#;
const RETURN: &str = r#"{"return": {"status": "paused", "running": false}, "id": 3}"#;

pub(super) fn qmp() -> Seeds {
    let migration = r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", "data": {"status": "active"}}"#;
    let refusal = r#"{"id": 4, "error": {"class": "GenericError", "desc": "State blocked by non-migratable device '0000:00:04.0/nvme'"}}"#;
    let nested = r#"{"return": [{"props": {"device": [1, 2.5e3, null, true, "\u001b[2J\ud83e\udd80"]}}], "id": 18446744073709551615}"#;
    let lines = |size: u8, lines: &[&str]| {
        let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        [&[size][..], lines.as_bytes()].concat()
    };
    named([
        ("greeting", lines(255, &[GREETING])),
        ("stop", lines(7, &[STOP])),
        ("migration", lines(255, &[migration])),
        ("return", lines(1, &[RETURN])),
        ("refusal", lines(255, &[refusal])),
        ("nested", lines(40, &[nested])),
        (
            "conversation",
            lines(64, &[GREETING, r#"{"return": {}, "id": 1}"#, STOP, RETURN, refusal, migration]),
        ),
        (
            "not-json",
            lines(255, &["QEMU 10.0.2 monitor\u{1b}[2J - type 'help' for more information", "(qemu) "]),
        ),
        ("no-end", [&[9][..], &RETURN.as_bytes()[..30]].concat()),
    ])
}
