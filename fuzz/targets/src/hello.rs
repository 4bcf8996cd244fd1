//! The first messages of a connection between daemons.

use memlane_protocol::wire::Label;
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, HELLO_BYTES, Hello, common_version, is_hello};

use crate::text::check_plain;

/// Reads a hello, an answer to one, and a name.
pub fn hello(bytes: &[u8]) {
    if let Ok(hello) = Hello::decode(bytes) {
        assert!(is_hello(bytes) && bytes.len() == HELLO_BYTES);
        assert!(hello.oldest <= hello.newest);
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello.clone()));
        check_versions((hello.oldest, hello.newest));
    }
    answer(bytes);
    if let Ok(name) = std::str::from_utf8(bytes)
        && let Ok(label) = name.parse::<Label>()
    {
        assert_eq!(label.as_str(), name);
        assert!(name.len() < 64 && !name.starts_with('.') && !name.contains(['/', '\0', ' ']));
    }
}

fn answer(bytes: &[u8]) {
    let announced = bytes.get(..ANSWER_BYTES).map(Answer::text_bytes);
    let Ok(answer) = Answer::decode(bytes) else { return };
    assert_eq!(announced, Some(Ok(bytes.len() - ANSWER_BYTES)), "what is announced is what is read");
    if let Answer::Refused { reason } = &answer {
        check_plain(reason);
    }
    assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
}

fn check_versions(theirs: (u16, u16)) {
    let ours = memlane_protocol::wire::hello::VERSIONS;
    let common = common_version(ours, theirs);
    assert_eq!(common, common_version(theirs, ours), "both sides find the same");
    let both = |version| [ours, theirs].iter().all(|(oldest, newest)| (oldest..=newest).contains(&&version));
    assert!(common.is_none_or(both));
}
