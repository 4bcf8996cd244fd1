//! What QEMU says on its monitor.

use memlane_qmp::{Answer, Commands, DecodeError, Decoder, Event, Message};
use serde_json::{Value, json};

use crate::text::check_plain;

/// Reads lines of QEMU. The bytes may come in any pieces; the first one says in which.
pub fn qmp(bytes: &[u8]) {
    let Some((size, stream)) = bytes.split_first() else { return };
    let at_once = read(stream, stream.len().max(1));
    assert_eq!(
        read(stream, usize::from(*size).max(1)),
        at_once,
        "it does not matter in which pieces they come"
    );
    for message in at_once.iter().flatten() {
        check(message);
        let line = format!("{}\n", line_of(message));
        assert_eq!(read(line.as_bytes(), line.len()), [Ok(message.clone())]);
    }
    if let Some(Err(DecodeError::NotJson { line })) = at_once.last() {
        check_plain(line);
        assert!(line.chars().count() <= 80, "{line:?}");
    }
    command(&String::from_utf8_lossy(stream));
}

/// Reads all messages, and the error that ends them if there is one.
fn read(stream: &[u8], size: usize) -> Vec<Result<Message, DecodeError>> {
    let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
    for piece in stream.chunks(size) {
        decoder.push(piece);
        while let Some(message) = decoder.next_message().transpose() {
            let ended = message.is_err();
            messages.push(message);
            if ended {
                return messages;
            }
        }
    }
    messages
}

fn check(message: &Message) {
    if let Message::Answer(Answer { id, outcome }) = message {
        assert!(id.is_none_or(|id| !Answer { id: Some(id), outcome: outcome.clone() }.is_to(id ^ 1)));
        if let Err(refusal) = outcome {
            assert!(!refusal.to_string().contains(memlane_protocol::wire::is_obeyed), "{refusal}");
        }
    }
}

/// Returns the line with which QEMU would say this.
fn line_of(message: &Message) -> Value {
    match message {
        Message::Greeting(greeting) => {
            let version = greeting.version.map(
                |[major, minor, micro]| json!({ "qemu": { "major": major, "minor": minor, "micro": micro } }),
            );
            json!({ "QMP": { "version": version } })
        }
        Message::Event(Event { name, data, at }) => {
            let at = at.map(|at| json!({ "seconds": at.as_secs(), "microseconds": at.subsec_micros() }));
            json!({ "event": name, "data": data, "timestamp": at })
        }
        Message::Answer(Answer { id, outcome: Ok(value) }) => json!({ "return": value, "id": id }),
        Message::Answer(Answer { id, outcome: Err(refusal) }) => {
            json!({ "error": { "class": refusal.class, "desc": refusal.description }, "id": id })
        }
    }
}

/// A command is one line, whatever is in its arguments.
fn command(text: &str) {
    let (id, line) = Commands::default().encode("human-monitor-command", &json!({ "command-line": text }));
    assert_eq!(line.find('\n'), Some(line.len() - 1));
    let read: Value = serde_json::from_str(&line).expect("a command is JSON");
    assert_eq!((read["arguments"]["command-line"].as_str(), read["id"].as_u64()), (Some(text), Some(id)));
}
