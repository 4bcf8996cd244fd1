//! Bounds of what the daemon asks of the starter, and of the users that are guests'.

use crate::wire::WireError;
use crate::wire::starter::{GuestUsers, HEADER_BYTES, MAX_ARGUMENTS, MAX_DESCRIPTORS, StartRequest};

fn request() -> StartRequest {
    StartRequest {
        user: 2_100_000_000,
        groups: vec![104],
        descriptors: 3,
        program: b"/usr/bin/qemu-system-x86_64".to_vec(),
        attach_socket: b"/run/memlane/attach.sock".to_vec(),
        arguments: vec![b"-m".to_vec(), b"1G".to_vec()],
    }
}

/// Returns why a starter refuses the request.
fn refusal(request: &StartRequest) -> String {
    let bytes = request.encode();
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
    let read = StartRequest::body_bytes(header).and_then(|_| StartRequest::decode(body));
    read.unwrap_err().to_string()
}

#[test]
fn nothing_grows_beyond_its_bound() {
    for (request, why) in [
        (StartRequest { descriptors: MAX_DESCRIPTORS + 1, ..request() }, "count of descriptors is 33"),
        (StartRequest { descriptors: 1000, ..request() }, "count of descriptors is 255"),
        (StartRequest { groups: vec![7; 33], ..request() }, "count of groups is 33"),
        (StartRequest { arguments: vec![Vec::new(); MAX_ARGUMENTS + 1], ..request() }, "arguments is 513"),
        (StartRequest { program: vec![b'/'; 8193], ..request() }, "program's path is 8193"),
        (StartRequest { arguments: vec![vec![b'x'; 70_000]], ..request() }, "argument is 65535"),
        (StartRequest { arguments: vec![vec![b'x'; 9_000]; 500], ..request() }, "QEMU is 45"),
    ] {
        let told = refusal(&request);
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn another_version_is_told() {
    let mut bytes = request().encode();
    bytes[4] = 9;
    let told = StartRequest::body_bytes(bytes.first_chunk().unwrap()).unwrap_err();
    assert!(matches!(told, WireError::Unknown { found: 9, .. }));
    assert!(told.to_string().contains("install daemon and starter of one build: 9"), "{told}");
    bytes[..4].copy_from_slice(b"GET ");
    let told = StartRequest::body_bytes(bytes.first_chunk().unwrap()).unwrap_err();
    assert!(matches!(told, WireError::Magic { .. }));
}

#[test]
fn guests_users_are_those_of_nobody_else() {
    let users: GuestUsers = "2000-2999".parse().unwrap();
    assert_eq!((users.to_string().as_str(), users.count()), ("2000-2999", 1000));
    assert!(users.contains(2000) && users.contains(2999) && !users.contains(1999) && !users.contains(3000));
    assert_eq!([0, 999, 1000, u64::MAX].map(|number| users.nth(number)), [2000, 2999, 2000, 2615]);
    assert_eq!(GuestUsers::default().to_string().parse(), Ok(GuestUsers::default()));
    assert!(GuestUsers::ALLOWED.contains(&GuestUsers::default().to_string()));
    for wrong in [
        "",
        "2000",
        "2000-",
        "-2000",
        "2999-2000",
        "+2000-2999",
        "2000 - 2999",
        "999-1000",
        "0-4294967295",
        "2000-2147483648",
        "60000-70000",
        "2000-2999-3000",
    ] {
        assert_eq!(wrong.parse::<GuestUsers>(), Err(()), "{wrong}");
    }
}
