//! The guest file, which comes from an operator or from another host.

use std::os::fd::RawFd;
use std::path::Path;

use memlane_guest::qemu::definition::{
    BACKEND, Definition, DefinitionError, Given, MAX_ARGUMENT, MAX_ARGUMENTS,
};
use memlane_protocol::wire::machine::{MAX_NICS, MAX_RAM_BYTES};

use crate::text::check_complaint;

/// Reads a guest file, and makes QEMU's arguments of it.
pub fn guest_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Definition::parse(Path::new("web1.toml"), text) {
        Ok(definition) => {
            assert_eq!(definition.text, text);
            check_bounds(&definition);
            [false, true].iter().for_each(|incoming| check_command_line(&definition, *incoming));
            let again = Definition::parse(Path::new("web1.toml"), &definition.text);
            assert_eq!(again.ok(), Some(definition), "the host that it is sent to reads the same");
        }
        Err(error) => {
            let complaint = error.to_string();
            assert!(complaint.starts_with("web1.toml:"), "{complaint}");
            assert!(!matches!(error, DefinitionError::Program { .. }));
            check_complaint(&complaint);
        }
    }
}

fn check_bounds(definition: &Definition) {
    assert!((1..=MAX_RAM_BYTES).contains(&definition.memory) && definition.memory.is_multiple_of(8 << 10));
    assert!(definition.nics.len() <= MAX_NICS && definition.arguments.len() <= MAX_ARGUMENTS);
    assert!(definition.qemu.is_absolute());
    for argument in &definition.arguments {
        assert!(argument.len() <= MAX_ARGUMENT && !argument.contains('\0'));
    }
    for (number, nic) in definition.nics.iter().enumerate() {
        assert!(nic.mac[0] & 1 == 0 && (1..16).contains(&nic.tap.len()));
        let others = &definition.nics[..number];
        assert!(others.iter().all(|other| other.mac != nic.mac && other.tap != nic.tap));
    }
}

/// QEMU takes from the arguments what the daemon has put there, and the file adds nothing to it.
fn check_command_line(definition: &Definition, incoming: bool) {
    let taps = 5..5 + definition.nics.len() as RawFd;
    let given = Given::by_descriptor(3, 4, taps);
    let line = definition.command_line(&given, incoming);
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    let values = |option: &str| -> Vec<Vec<String>> {
        let found = line.windows(2).filter(|pair| pair[0] == option);
        found.map(|pair| parameters(pair[1])).collect()
    };
    assert!(!line.iter().any(|argument| argument.contains('\0')), "{line:?}");
    assert_eq!(line.iter().filter(|argument| ["-m", "--m"].contains(argument)).count(), 1, "{line:?}");
    assert_eq!(line.contains(&"-incoming") || line.contains(&"--incoming"), incoming);
    let name = format!("guest={}", definition.name);
    assert_eq!(values("-name"), [[name, "debug-threads=on".to_owned()]]);
    let backend = &values("-object")[0];
    assert_eq!(backend[1], format!("id={BACKEND}"));
    assert!(backend.contains(&"mem-path=/proc/self/fd/3".to_owned()), "{backend:?}");
    let monitor = ["socket", "id=memlane-monitor", "fd=4", "server=on", "wait=off"].map(String::from);
    assert_eq!(values("-chardev")[0], monitor);
    assert_eq!(values("-mon")[0], ["chardev=memlane-monitor", "mode=control"]);
    assert!(line.contains(&"-sandbox") || line.contains(&"--sandbox"), "{line:?}");
    for (number, nic) in definition.nics.iter().enumerate() {
        let vhost = if nic.vhost { "vhost=on" } else { "vhost=off" };
        let (id, tap) = (format!("id=memlane-net{number}"), format!("fd={}", 5 + number));
        let expected = ["tap", &id, &tap, vhost].map(String::from);
        assert!(values("-netdev").contains(&expected.to_vec()), "{line:?}");
    }
}

/// Takes a value of QEMU apart: parameters are set apart by commas, and two commas stand for one within a parameter.
fn parameters(value: &str) -> Vec<String> {
    let (mut found, mut characters) = (vec![String::new()], value.chars().peekable());
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            found.push(String::new());
        } else {
            found.last_mut().expect("there is one from the start").push(character);
        }
    }
    found
}
