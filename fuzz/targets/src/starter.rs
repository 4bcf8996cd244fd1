//! What the daemon asks of the starter, which runs with more rights than the daemon.

use memlane_protocol::wire::starter::{
    GuestUsers, HEADER_BYTES, MAX_ARGUMENTS, MAX_DESCRIPTORS, MAX_GROUPS, StartRequest,
};

/// Reads a request, header and all, and a range of users.
pub fn starter(bytes: &[u8]) {
    if let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>()
        && StartRequest::body_bytes(header) == Ok(body.len())
        && let Ok(request) = StartRequest::decode(body)
    {
        assert!(request.descriptors <= MAX_DESCRIPTORS && request.groups.len() <= MAX_GROUPS);
        assert!(request.arguments.len() <= MAX_ARGUMENTS);
        assert_eq!(request.encode(), bytes, "a request has one form");
    }
    if let Ok(users) = std::str::from_utf8(bytes)
        && let Ok(users) = users.parse::<GuestUsers>()
    {
        assert!(!users.contains(0) && !users.contains(65534) && users.count() > 0);
        assert!([0, 1, u64::MAX].into_iter().all(|number| users.contains(users.nth(number))));
        assert_eq!(users.to_string().parse(), Ok(users));
    }
}
