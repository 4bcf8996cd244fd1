//! Handshakes between hosts whose keys the project's own authority has made, and records against rustls itself.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use memlane_keys::{Authority, CA, CERTIFICATE, KEY, Validity};
use memlane_protocol::wire::Label;
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// The hosts of a test: directories with keys.
struct Fleet(TempDir);

/// An authority's name, and a host's.
type Of<'a> = (&'a Authority, &'a str);

impl Fleet {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Makes the keys of `host`, signed by `authority`; the host trusts `trusted`.
    fn make(&self, (authority, host): Of<'_>, trusted: &Authority, validity: Validity) {
        let directory = self.0.path().join(host);
        authority.issue_to(&directory, host, validity).unwrap();
        fs::write(directory.join(CA), trusted.certificate()).unwrap();
    }

    fn files(&self, host: &str) -> KeyFiles {
        let directory = self.0.path().join(host);
        KeyFiles {
            certificate: directory.join(CERTIFICATE),
            key: directory.join(KEY),
            ca: directory.join(CA),
        }
    }

    /// Loads the keys of `host`, whose only peer is `peer`, with an authority of its own if there is one.
    fn load(&self, host: &str, peer: &str, ca: Option<&Path>) -> Result<Credentials, CredentialsError> {
        let peer = PeerAuthority { name: label(peer), ca: ca.map(Into::into) };
        Credentials::load(&self.files(host), &label(host), &[peer])
    }
}

fn label(name: &str) -> Label {
    name.parse().unwrap()
}

fn week() -> Validity {
    Validity::days(7)
}

/// Two hosts of one authority that know each other.
fn two_hosts() -> (Credentials, Credentials) {
    let (fleet, authority) = (Fleet::new(), Authority::new("test").unwrap());
    for host in ["host-a", "host-b"] {
        fleet.make((&authority, host), &authority, week());
    }
    (fleet.load("host-a", "host-b", None).unwrap(), fleet.load("host-b", "host-a", None).unwrap())
}

/// Moves bytes between the two ends of a handshake until both are done or one has failed. In the end each failure is
/// told to the other side.
fn shake(
    mut caller: Handshake,
    mut called: Handshake,
) -> (Result<Established, TlsError>, Result<Established, TlsError>) {
    loop {
        let (near, far) = (caller.step(), called.step());
        let (to_far, to_near) = (caller.outgoing(), called.outgoing());
        let moved = !to_far.is_empty() || !to_near.is_empty();
        called.received(&to_far).unwrap();
        caller.received(&to_near).unwrap();
        if moved {
            continue;
        }
        let end = |step: Result<Step, TlsError>, handshake: Handshake| match step? {
            Step::Done => handshake.finish(),
            Step::Exchange => panic!("the handshake waits for nothing"),
        };
        return (end(near, caller), end(far, called));
    }
}

/// The records of both ends of a connection from the first host to the second.
fn connection((a, b): &(Credentials, Credentials)) -> (Box<Records>, Box<Records>) {
    let caller = a.connect(&label("host-b")).unwrap();
    let (near, far) = shake(caller, b.accept().unwrap());
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(b.peer_of(&far.certificates), Ok(label("host-a")));
    (near.records, far.records)
}

/// Hands in bytes in pieces of so many, and returns all data.
fn open(records: &mut Records, mut bytes: &[u8], piece: usize) -> Result<Vec<u8>, TlsError> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let room = records.room();
        let count = room.len().min(bytes.len()).min(piece);
        room[..count].copy_from_slice(&bytes[..count]);
        records.received(count);
        bytes = &bytes[count..];
        loop {
            let data = records.data()?;
            if data.is_empty() {
                break;
            }
            // In two parts, as a message may end within a record.
            let part = data.len().div_ceil(2);
            all.extend_from_slice(&data[..part]);
            records.consume(part);
        }
    }
    Ok(all)
}

#[test]
fn hosts_of_one_authority_know_each_other() {
    let (mut near, mut far) = connection(&two_hosts());
    let there = near.sealed(b"from a").unwrap();
    assert_eq!(open(&mut far, &there, usize::MAX).unwrap(), b"from a");
    let back = far.sealed(b"from b").unwrap();
    assert_eq!(open(&mut near, &back, 1).unwrap(), b"from b");
}

#[test]
fn a_later_handshake_is_shorter_and_knows_the_host_all_the_same() {
    let hosts = two_hosts();
    let first = hosts.0.connect(&label("host-b")).unwrap();
    let (near, far) = shake(first, hosts.1.accept().unwrap());
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    assert!(!near.resumed && !far.resumed);
    // The ticket comes with the first data.
    let there = far.records.sealed(b"welcome").unwrap();
    assert_eq!(open(&mut near.records, &there, usize::MAX).unwrap(), b"welcome");
    let again = hosts.0.connect(&label("host-b")).unwrap();
    let (near, far) = shake(again, hosts.1.accept().unwrap());
    let far = far.unwrap();
    assert!(near.unwrap().resumed && far.resumed);
    assert_eq!(hosts.1.peer_of(&far.certificates), Ok(label("host-a")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn data_arrives_as_it_was_sent(
        sizes in vec(0..3 * MAX_RECORD_BYTES, 1..6),
        piece in 1..40_000usize,
        seed in any::<u8>(),
    ) {
        let (mut near, mut far) = connection(&two_hosts());
        // Keys change in the midst.
        near.change_keys_after(3);
        far.make_room(50_000);
        let (mut sent, mut sealed) = (Vec::new(), Vec::new());
        for size in sizes {
            let data: Vec<u8> = (0..size).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
            sealed.extend(near.sealed(&data).unwrap());
            sent.extend(data);
        }
        prop_assert!(open(&mut far, &sealed, piece).unwrap() == sent);
    }

    #[test]
    fn a_changed_byte_does_not_go_unnoticed(at in 0..20_000usize, bit in 0..8u8) {
        let (mut near, mut far) = connection(&two_hosts());
        let mut sealed = near.sealed(&[7; 19_000]).unwrap();
        let at = at % sealed.len();
        sealed[at] ^= 1 << bit;
        // A length that grew lets the receiver wait for more.
        sealed.extend(vec![0; 1 << 16]);
        prop_assert!(open(&mut far, &sealed, usize::MAX).is_err());
    }

    #[test]
    fn bytes_of_anybody_are_refused_and_nothing_more(bytes in vec(any::<u8>(), 0..200)) {
        let (a, b) = two_hosts();
        for mut handshake in [a.connect(&label("host-b")).unwrap(), b.accept().unwrap()] {
            handshake.step().unwrap();
            handshake.received(&bytes).unwrap();
            let _ = handshake.step();
        }
        let (mut near, _) = connection(&(a, b));
        if bytes.len() >= 6 {
            let _ = open(&mut near, &bytes, usize::MAX);
        }
    }
}

#[test]
fn records_that_are_lost_swapped_or_repeated_do_not_open() {
    let hosts = two_hosts();
    type Play = fn(&[Vec<u8>; 3]) -> Vec<u8>;
    let plays: [Play; 3] = [
        |records| [&records[0][..], &records[2]].concat(),
        |records| [&records[1][..], &records[0]].concat(),
        |records| [&records[0][..], &records[0]].concat(),
    ];
    for play in plays {
        let (mut near, mut far) = connection(&hosts);
        let records = [1, 2, 3].map(|byte| near.sealed(&[byte; 100]).unwrap());
        assert!(matches!(open(&mut far, &play(&records), usize::MAX), Err(TlsError::Open)));
    }
    // What one connection has sealed, another does not open.
    let ((mut near, _), (_, mut other)) = (connection(&hosts), connection(&hosts));
    let sealed = near.sealed(b"for far").unwrap();
    assert!(matches!(open(&mut other, &sealed, usize::MAX), Err(TlsError::Open)));
    // Nor does the sender, if it comes back to it.
    assert!(matches!(open(&mut near, &sealed, usize::MAX), Err(TlsError::Open)));
}

#[test]
fn records_and_rustls_understand_each_other() {
    let hosts = two_hosts();
    let settings = hosts.1.client_settings(&label("host-a"));
    let mut rustls = rustls::ClientConnection::new(settings, "host-a".try_into().unwrap()).unwrap();
    let mut called = hosts.0.accept().unwrap();
    let mut wire = Vec::new();
    loop {
        wire.clear();
        while rustls.wants_write() {
            rustls.write_tls(&mut wire).unwrap();
        }
        called.received(&wire).unwrap();
        let step = called.step().unwrap();
        let back = called.outgoing();
        let mut rest = &back[..];
        while !rest.is_empty() {
            rustls.read_tls(&mut rest).unwrap();
            rustls.process_new_packets().unwrap();
        }
        if step == Step::Done && !rustls.is_handshaking() {
            break;
        }
    }
    let mut records = called.finish().unwrap().records;
    records.change_keys_after(2);
    for round in 0..5u8 {
        // rustls changes its keys, and asks for a change here.
        rustls.refresh_traffic_keys().unwrap();
        let data = vec![round; 40_000];
        let mut sealed = Vec::new();
        for part in data.chunks(10_000) {
            rustls.writer().write_all(part).unwrap();
            while rustls.wants_write() {
                rustls.write_tls(&mut sealed).unwrap();
            }
        }
        assert!(open(&mut records, &sealed, 7_000).unwrap() == data);
        let answer = records.sealed(&data).unwrap();
        let (mut rest, mut found) = (&answer[..], Vec::new());
        while !rest.is_empty() {
            rustls.read_tls(&mut rest).unwrap();
            rustls.process_new_packets().unwrap();
            let _ = rustls.reader().read_to_end(&mut found);
        }
        assert!(found == data, "round {round}");
    }
    rustls.send_close_notify();
    let mut end = Vec::new();
    rustls.write_tls(&mut end).unwrap();
    assert!(matches!(open(&mut records, &end, usize::MAX), Err(TlsError::Closed)));
}

/// Tells what the caller and the called host say of a connection from host-a to host-b.
fn refusal(fleet: &Fleet) -> (String, String) {
    let a = fleet.load("host-a", "host-b", None).unwrap();
    let b = fleet.load("host-b", "host-a", None).unwrap();
    let caller = a.connect(&label("host-b")).unwrap();
    let (near, far) = shake(caller, b.accept().unwrap());
    let text = |result: Result<Established, TlsError>| match result {
        Err(error) => error.to_string(),
        Ok(_) => "accepted".to_owned(),
    };
    (text(near), text(far))
}

#[test]
fn certificates_that_are_not_valid_are_refused_and_both_sides_say_why() {
    let (ours, others) = (Authority::new("ours").unwrap(), Authority::new("others").unwrap());
    let now = SystemTime::now();
    let expired = Validity { from: now - 3 * DAY, until: now - DAY };
    let early = Validity { from: now + DAY, until: now + 3 * DAY };
    // Whose certificate is wrong, how, and what each side says of it.
    for (wrong, authority, validity, words) in [
        ("host-a", &ours, expired, ["is expired, or not valid yet", "it has expired"]),
        ("host-a", &ours, early, ["is expired, or not valid yet", "it is not valid yet"]),
        ("host-a", &others, week(), ["does not know the authority", "no authority that is known"]),
        ("host-b", &ours, expired, ["it has expired", "is expired, or not valid yet"]),
        ("host-b", &ours, early, ["it is not valid yet", "is expired, or not valid yet"]),
        ("host-b", &others, week(), ["no authority that is known", "does not know the authority"]),
    ] {
        let fleet = Fleet::new();
        for host in ["host-a", "host-b"] {
            let (by, valid) = if host == wrong { (authority, validity) } else { (&ours, week()) };
            fleet.make((by, host), &ours, valid);
        }
        let (near, far) = refusal(&fleet);
        assert!(near.contains(words[0]), "{wrong}, {words:?}: {near}");
        assert!(far.contains(words[1]), "{wrong}, {words:?}: {far}");
    }
}

#[test]
fn a_peer_is_the_name_in_its_certificate_under_its_own_authority() {
    let fleet = Fleet::new();
    let (ours, theirs) = (Authority::new("ours").unwrap(), Authority::new("theirs").unwrap());
    fleet.make((&ours, "host-a"), &ours, week());
    fleet.make((&theirs, "host-b"), &theirs, week());
    fleet.make((&ours, "host-c"), &ours, week());
    let (ours_ca, theirs_ca) = (fleet.files("host-a").ca, fleet.files("host-b").ca);
    let a = fleet.load("host-a", "host-b", Some(&theirs_ca)).unwrap();
    let b = fleet.load("host-b", "host-a", Some(&ours_ca)).unwrap();
    // Two administrations.
    connection(&(a, b));

    // Another host of an authority that is known.
    let a = fleet.load("host-a", "host-b", Some(&theirs_ca)).unwrap();
    let c = fleet.load("host-c", "host-a", None).unwrap();
    let (_, far) = shake(c.connect(&label("host-a")).unwrap(), a.accept().unwrap());
    let error = a.peer_of(&far.unwrap().certificates).unwrap_err();
    assert_eq!(error, IdentityError::NoPeer("host-c".into()));

    // A certificate of host-b's name that our own authority signed is not host-b's.
    let forged = Fleet::new();
    forged.make((&ours, "host-b"), &ours, week());
    let b = forged.load("host-b", "host-a", None).unwrap();
    let (near, far) = shake(b.connect(&label("host-a")).unwrap(), a.accept().unwrap());
    assert!(near.is_ok());
    let error = a.peer_of(&far.unwrap().certificates).unwrap_err();
    assert!(matches!(error, IdentityError::NotValid { .. }), "{error}");
    // And host-a does not accept it as the host that it has called.
    let (near, _) = shake(a.connect(&label("host-b")).unwrap(), b.accept().unwrap());
    assert!(near.err().unwrap().to_string().contains("no authority that is known"));

    // The host that was called is another.
    let fleet = Fleet::new();
    for host in ["host-a", "host-b", "host-c"] {
        fleet.make((&ours, host), &ours, week());
    }
    let (a, c) =
        (fleet.load("host-a", "host-b", None).unwrap(), fleet.load("host-c", "host-a", None).unwrap());
    let (near, _) = shake(a.connect(&label("host-b")).unwrap(), c.accept().unwrap());
    let error = near.err().unwrap().to_string();
    assert!(error.contains("host-b") && error.contains("host-c"), "{error}");
    assert!(matches!(c.connect(&label("host-b")), Err(TlsError::NoPeer(_))));
}

/// While the file of authorities has both, hosts of the old one and of the new one know each other.
#[test]
fn an_authority_is_changed_step_by_step() {
    let fleet = Fleet::new();
    let (old, new) = (Authority::new("old").unwrap(), Authority::new("new").unwrap());
    for (authority, host) in [(&old, "host-a"), (&new, "host-b")] {
        fleet.make((authority, host), authority, week());
        let both = [old.certificate(), new.certificate()].concat();
        fs::write(fleet.files(host).ca, both).unwrap();
    }
    let load = |host, peer| fleet.load(host, peer, None).unwrap();
    connection(&(load("host-a", "host-b"), load("host-b", "host-a")));
    // Once the old one is out, its hosts are refused.
    fs::write(fleet.files("host-b").ca, new.certificate()).unwrap();
    let (near, far) = refusal(&fleet);
    assert!(
        near.contains("does not know the authority") && far.contains("no authority that is known"),
        "{near}; {far}"
    );
}

/// A search among many certificates that name each other would take seconds, whoever asks for it.
#[test]
fn long_chains_are_not_looked_at() {
    let (fleet, authority) = (Fleet::new(), Authority::new("test").unwrap());
    for host in ["host-a", "host-b"] {
        fleet.make((&authority, host), &authority, week());
    }
    for (extra, refused) in [(4, false), (5, true)] {
        let path = fleet.files("host-a").certificate;
        let own = fs::read_to_string(&path).unwrap();
        fs::write(&path, own.clone() + &authority.certificate().repeat(extra)).unwrap();
        let (near, far) = refusal(&fleet);
        assert_eq!(far.contains("too many certificates"), refused, "{extra}: {far}");
        assert_eq!(near == "accepted", !refused, "{extra}: {near}");
        fs::write(&path, own).unwrap();
    }
}

#[test]
fn keys_that_cannot_be_used_are_named() {
    let (fleet, authority) = (Fleet::new(), Authority::new("test").unwrap());
    for host in ["host-a", "host-b"] {
        fleet.make((&authority, host), &authority, week());
    }
    let complaint = |files: KeyFiles, host: &str| {
        let error = Credentials::load(&files, &label(host), &[]).err().unwrap();
        error.to_string()
    };
    let (a, b) = (fleet.files("host-a"), fleet.files("host-b"));
    let error = complaint(a.clone(), "host-b");
    assert!(
        error.contains("host.pem") && error.contains("it is of \"host-a\"") && error.contains("host-b"),
        "{error}"
    );
    let error = complaint(KeyFiles { key: b.key.clone(), ..a.clone() }, "host-a");
    assert!(error.contains("host-b/host.key"), "{error}");
    let error = complaint(KeyFiles { certificate: a.key.clone(), ..a.clone() }, "host-a");
    assert!(error.contains("no certificate in PEM"), "{error}");
    let error = complaint(KeyFiles { ca: "/nonexistent/ca.pem".into(), ..a.clone() }, "host-a");
    assert!(error.contains("/nonexistent/ca.pem") && error.contains("memlanectl keys init"), "{error}");
    let error = complaint(a.clone(), "host_a.-");
    assert!(error.contains("cannot be the name of a certificate"), "{error}");
    fs::set_permissions(&a.key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = complaint(a, "host-a");
    assert!(error.contains("host.key") && error.contains("0644"), "{error}");
    fs::set_permissions(&b.ca, fs::Permissions::from_mode(0o646)).unwrap();
    let error = complaint(b.clone(), "host-b");
    assert!(error.contains("every user may change") && error.contains("ca.pem"), "{error}");
    fs::set_permissions(&b.ca, fs::Permissions::from_mode(0o644)).unwrap();
    let days = b_expires_in_days(&fleet);
    assert!((6..=7).contains(&days), "{days}");
}

fn b_expires_in_days(fleet: &Fleet) -> u64 {
    let b = fleet.load("host-b", "host-a", None).unwrap();
    b.expires().duration_since(SystemTime::now()).unwrap().as_secs() / DAY.as_secs()
}
