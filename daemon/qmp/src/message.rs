//! [`Message`]: what QEMU says.

use std::fmt;
use std::time::Duration;

use memlane_protocol::wire::plain;
use serde_json::Value;

/// One line of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first line of a connection.
    Greeting(Greeting),
    /// Something has happened in QEMU.
    Event(Event),
    /// A command has been carried out, or refused.
    Answer(Answer),
}

/// What QEMU says of itself when a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The version of QEMU: major, minor and micro. It is `None` if the greeting has no such numbers.
    pub version: Option<[u32; 3]>,
}

/// An event, which no command has asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The name, such as `STOP`.
    pub name: String,
    /// The data, which is null if there is none.
    pub data: Value,
    /// The time of the event by the clock of QEMU's host, since 1970-01-01T00:00:00Z. It is `None` if QEMU could not
    /// read that clock.
    pub at: Option<Duration>,
}

/// The answer to a command.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The number of the command. It is `None` if QEMU could not read what it answers.
    pub id: Option<u64>,
    /// What the command returned, or why QEMU refused it.
    pub outcome: Result<Value, Refusal>,
}

/// The reason why QEMU did not carry out a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The class, such as `CommandNotFound`; most are `GenericError`. It is plain text.
    pub class: String,
    /// The description for people, as plain text.
    pub description: String,
}

impl Message {
    pub(crate) fn of(mut line: Value) -> Self {
        if let Some(greeting) = line.get("QMP") {
            Self::Greeting(Greeting::of(greeting))
        } else if let Some(name) = line.get("event") {
            let name = name.as_str().unwrap_or_default().to_owned();
            Self::Event(Event { name, at: time(&line["timestamp"]), data: take(&mut line, "data") })
        } else {
            let id = line.get("id").and_then(Value::as_u64);
            let outcome = match line.get("error") {
                Some(error) => Err(Refusal::of(error)),
                None => Ok(take(&mut line, "return")),
            };
            Self::Answer(Answer { id, outcome })
        }
    }
}

impl Greeting {
    fn of(greeting: &Value) -> Self {
        let version = &greeting["version"]["qemu"];
        let part = |name: &str| version[name].as_u64().and_then(|number| u32::try_from(number).ok());
        let version = part("major").zip(part("minor")).zip(part("micro"));
        Self { version: version.map(|((major, minor), micro)| [major, minor, micro]) }
    }
}

impl Answer {
    /// Tells whether this is the answer to the command of this number, of a client that gives one command at a time:
    /// then what QEMU could not read is that command.
    pub fn is_to(&self, id: u64) -> bool {
        self.id.is_none_or(|of| of == id)
    }
}

impl Refusal {
    fn of(error: &Value) -> Self {
        let text = |name: &str, default: &str| plain(error[name].as_str().unwrap_or(default)).into_owned();
        Self { class: text("class", "GenericError"), description: text("desc", "it does not say why") }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.description, self.class)
    }
}

fn time(timestamp: &Value) -> Option<Duration> {
    // QEMU writes -1 if it cannot read the clock.
    let (seconds, microseconds) = timestamp["seconds"].as_u64().zip(timestamp["microseconds"].as_u64())?;
    Some(Duration::from_secs(seconds) + Duration::from_micros(microseconds.min(999_999)))
}

fn take(line: &mut Value, name: &str) -> Value {
    line.get_mut(name).map(Value::take).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_greeting_has_a_version() {
        let qemu = json!({ "QMP": { "version": { "qemu": { "major": 7, "minor": 2, "micro": 1 } } } });
        assert_eq!(Message::of(qemu), Message::Greeting(Greeting { version: Some([7, 2, 1]) }));
        for other in [json!({ "QMP": {} }), json!({ "QMP": { "version": { "qemu": { "major": 7 } } } })] {
            assert_eq!(Message::of(other), Message::Greeting(Greeting { version: None }));
        }
    }

    #[test]
    fn an_event_has_a_time_and_data() {
        let stop = json!({ "event": "STOP", "timestamp": { "seconds": 7, "microseconds": 250_000 } });
        let Message::Event(event) = Message::of(stop) else { panic!("an event") };
        assert_eq!((event.name.as_str(), event.data), ("STOP", Value::Null));
        assert_eq!(event.at, Some(Duration::from_millis(7250)));
        let unread = json!({ "event": "MIGRATION", "data": { "status": "active" },
            "timestamp": { "seconds": -1, "microseconds": -1 } });
        let Message::Event(event) = Message::of(unread) else { panic!("an event") };
        assert_eq!((event.data["status"].as_str(), event.at), (Some("active"), None));
    }

    #[test]
    fn an_answer_is_a_value_or_a_refusal_in_plain_text() {
        let Message::Answer(answer) = Message::of(json!({ "return": { "status": "paused" }, "id": 3 }))
        else {
            panic!("an answer")
        };
        assert!(answer.is_to(3) && !answer.is_to(4));
        assert_eq!(answer.outcome, Ok(json!({ "status": "paused" })));
        let refusal = json!({ "error": { "class": "CommandNotFound", "desc": "no \u{1b}[2Jfly" } });
        let Message::Answer(answer) = Message::of(refusal) else { panic!("an answer") };
        assert!(answer.is_to(3), "what cannot be read has no number");
        let refusal = answer.outcome.expect_err("a refusal");
        assert_eq!(refusal.to_string(), "no \u{fffd}[2Jfly (CommandNotFound)");
    }
}
