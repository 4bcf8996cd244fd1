//! What daemons of version 3 said to each other, as it was on the wire: it is understood, and would be said in the same bytes.
//!
//! `version-3/` has both directions of four control connections, of daemons from before version 4: a guest moved by pre-copy
//! with `--verify`, one by post-copy, the connection over which its pages were fetched, and an offer that was refused. Nothing was encrypted.

use std::path::Path;

use memlane_protocol::wire::control::{Control, HEADER_BYTES, decode_header};
use memlane_protocol::wire::hello::{
    ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Purpose, VERSIONS, common_version,
};

const RECORDED: u16 = 3;

fn recorded(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/version-3").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Reads messages to the end of the bytes. Returns their names, each once where it comes several times in a row.
fn messages(mut bytes: &[u8]) -> Vec<&'static str> {
    let mut names = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at(HEADER_BYTES);
        let (kind, length) = decode_header(head).unwrap();
        let (body, rest) = rest.split_at(length);
        let message = Control::decode(kind, body).unwrap();
        assert_eq!(message.encode(), [head, body].concat(), "{} is said in other bytes now", message.name());
        bytes = rest;
        if !["ping", "pong"].contains(&message.name()) {
            names.push(message.name());
        }
    }
    names.dedup();
    names
}

fn source(name: &str) -> Vec<&'static str> {
    let bytes = recorded(&format!("{name}-source"));
    let (greeting, rest) = bytes.split_at(HELLO_BYTES);
    let hello = Hello::decode(greeting).unwrap();
    assert_eq!((hello.host.as_str(), hello.newest), ("host-a", RECORDED));
    assert_eq!(hello.purpose, Purpose::Control);
    assert_eq!(hello.encode(), greeting);
    assert_eq!(common_version(VERSIONS, (hello.oldest, hello.newest)), Some(RECORDED));
    messages(rest)
}

fn destination(name: &str) -> Vec<&'static str> {
    let bytes = recorded(&format!("{name}-destination"));
    let (greeting, rest) = bytes.split_at(ANSWER_BYTES);
    let answer = Answer::Welcome { version: RECORDED };
    assert_eq!((Answer::decode(greeting), answer.encode()), (Ok(answer), greeting.to_vec()));
    messages(rest)
}

#[test]
fn a_guest_moves_by_precopy() {
    let said = ["lanes from", "offer", "round", "holes", "verify", "state", "handover"];
    assert_eq!(source("precopy"), said);
    assert_eq!(destination("precopy"), ["accept", "holes done", "digests", "handover"]);
}

#[test]
fn a_guest_moves_by_postcopy() {
    assert_eq!(source("postcopy"), ["lanes from", "offer", "missing", "state", "handover"]);
    let answered = ["accept", "missing done", "handover", "fetched", "handover"];
    assert_eq!(destination("postcopy"), answered);
}

#[test]
fn what_is_missing_is_fetched() {
    assert_eq!(source("fetch"), ["lanes from", "fetch"]);
    assert_eq!(destination("fetch"), ["accept", "missing"]);
}

#[test]
fn an_offer_is_refused() {
    assert_eq!(source("refused"), ["lanes from", "offer"]);
    assert_eq!(destination("refused"), ["refuse"]);
}
