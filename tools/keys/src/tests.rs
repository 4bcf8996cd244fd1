//! The authority on disk, and what its certificates say.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_authority_is_kept_and_signs_later_as_well() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, host) = (directory.path().join("new/ca"), directory.path().join("host"));
    assert!(matches!(Authority::open(&ca), Err(KeysError::NoAuthority(_))));
    Authority::new("our authority").unwrap().save(&ca).unwrap();
    Authority::open(&ca).unwrap().issue_to(&host, "host-a", Validity::days(30)).unwrap();

    assert_eq!((mode(&ca), mode(&host)), (0o700, 0o700));
    for (directory, file) in [(&ca, CA), (&ca, CA_KEY), (&host, CA), (&host, CERTIFICATE), (&host, KEY)] {
        assert_eq!(mode(&directory.join(file)), 0o600, "{file}");
    }
    let of_host = describe(&host).unwrap();
    let [own, authority] = &of_host[..] else { panic!("{of_host:?}") };
    assert_eq!(
        (&own.hosts[..], own.authority, own.signed_by_ca),
        (&["host-a".to_owned()][..], false, Some(true))
    );
    assert!(
        authority.authority && authority.hosts.is_empty() && own.issuer == authority.subject,
        "{of_host:?}"
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!(own.valid_from_seconds < now && (own.valid_until_seconds - now) / 86_400 >= 29, "{own:?}");
    assert_eq!(own.sha256.len(), 64);

    // A certificate that another authority has signed.
    let other = Authority::new("another").unwrap();
    fs::write(host.join(CA), other.certificate()).unwrap();
    assert_eq!(describe(&host).unwrap()[0].signed_by_ca, Some(false));
    fs::remove_file(host.join(CA)).unwrap();
    assert_eq!(describe(&host.join(CERTIFICATE)).unwrap()[0].signed_by_ca, None);
}

#[test]
fn nothing_that_is_there_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, host) = (directory.path().join("ca"), directory.path().join("host"));
    let authority = Authority::new("test").unwrap();
    authority.save(&ca).unwrap();
    let before = fs::read(ca.join(CA_KEY)).unwrap();
    assert!(matches!(Authority::new("test").unwrap().save(&ca), Err(KeysError::There(_))));
    assert_eq!(fs::read(ca.join(CA_KEY)).unwrap(), before);
    authority.issue_to(&host, "host-a", Validity::days(1)).unwrap();
    // One of the three is enough, and then none of the others is made.
    for file in [CA, CERTIFICATE] {
        fs::remove_file(host.join(file)).unwrap();
    }
    let error = authority.issue_to(&host, "host-a", Validity::days(1)).unwrap_err().to_string();
    assert!(error.contains("host.key is there already") && !host.join(CA).exists(), "{error}");
}

#[test]
fn what_cannot_be_used_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new("test").unwrap();
    for name in ["", "host a", "-", "host..a", "10.0.0.1/", &"x".repeat(300)] {
        let error = authority.issue(name, Validity::days(1)).unwrap_err();
        assert!(matches!(error, KeysError::Name(_)), "{name:?}: {error}");
    }
    authority.save(directory.path()).unwrap();
    fs::write(directory.path().join(CA_KEY), "nonsense").unwrap();
    let error = Authority::open(directory.path()).err().unwrap().to_string();
    assert!(error.contains("ca.key cannot be used"), "{error}");
    let error = describe(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(error.contains("cannot read /nonexistent"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = describe(empty.path()).unwrap_err().to_string();
    assert!(error.contains("neither host.pem nor ca.pem"), "{error}");
    // For ever, as far as a certificate can say it.
    let far =
        Validity { from: SystemTime::now(), until: SystemTime::now() + Duration::from_secs(86_400 * 36_500) };
    authority.issue("host-a", far).unwrap();
}
