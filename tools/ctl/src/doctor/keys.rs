//! The keys of this host: whether they are there, for the daemon alone, of this host, and valid.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memlane_keys::{Description, describe};
use memlane_protocol::wire::Label;
use memlane_tls::KeyFiles;

use super::accounts::DAEMON;
use super::{Finding, Host, Owner, is_root};

/// Operators are warned so long before a certificate expires, in seconds.
const SOON: i64 = 14 * 24 * 3600;

/// Looks at the keys.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let name = &host.config.host;
    let Some(files) = &host.config.keys else {
        let found = "insecure = true: guests' memory is not encrypted on its way, and peers are known by address alone";
        return vec![Finding::advice(
            "keys",
            found,
            "take that line out of the configuration, and make keys: docs/keys.md",
        )];
    };
    let refused = match host.config.credentials() {
        Ok(_) => None,
        Err(error) => {
            Some(Refused { absent: first_absent(files), denied: is_denied(files), why: error.to_string() })
        }
    };
    let handed_over = host.systemd.as_ref().is_some_and(|systemd| systemd.hands_over_keys);
    let mut findings = vec![keys(files, name, refused, handed_over)];
    if findings[0].remedy.is_some() {
        return findings;
    }
    findings.push(key_owner(&files.key, Owner::of(&files.key), host.accounts.user(DAEMON), handed_over));
    if let Ok(all) = describe(&files.certificate) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
        findings.push(certificate(&all, name, now));
    }
    findings
}

/// Why the keys cannot be used.
struct Refused {
    absent: Option<String>,
    denied: bool,
    why: String,
}

/// Judges the keys. systemd may hand them over from any other place.
fn keys(files: &KeyFiles, name: &Label, refused: Option<Refused>, handed_over: bool) -> Finding {
    const CHECK: &str = "keys";
    let directory = files.key.parent().unwrap_or(Path::new("/")).display();
    match refused {
        None => Finding::ok(
            CHECK,
            format!("{directory} has the certificate of {name}, its key, and the authority"),
        ),
        Some(Refused { absent: Some(file), .. }) if handed_over => Finding::advice(
            CHECK,
            format!("not looked at: systemd hands the keys to the daemon, and there is no {file}"),
            "memlanectl status says until when the certificate in use is valid",
        ),
        Some(Refused { absent: Some(file), .. }) => Finding::missing(
            CHECK,
            format!("there is no {file}"),
            format!(
                "memlanectl keys issue {name}, where the authority is (memlanectl keys init makes one); then put \
                 the three files into {directory} here: docs/keys.md"
            ),
        ),
        Some(Refused { denied: true, .. }) => Finding::advice(
            CHECK,
            format!("not looked at: this user may not read {directory}"),
            "sudo memlanectl doctor",
        ),
        Some(Refused { why, .. }) => {
            Finding::missing(CHECK, why, "memlanectl keys show; docs/keys.md says how to make new ones")
        }
    }
}

/// Judges whose the key is. systemd may read one that is root's, and hand it over.
fn key_owner(file: &Path, owner: Option<Owner>, daemon: Option<u32>, handed_over: bool) -> Finding {
    const CHECK: &str = "key-owner";
    let file = file.display();
    let Some(owner) = owner else {
        return Finding::advice(CHECK, format!("this user may not look at {file}"), "sudo memlanectl doctor");
    };
    let mend = format!("chown {DAEMON}:{DAEMON} {file} && chmod 600 {file}");
    if owner.mode & 0o077 != 0 {
        let found = format!("others than its owner may use {file} (mode {:04o})", owner.mode);
        return Finding::missing(CHECK, found, mend);
    }
    match (daemon, owner.user, handed_over) {
        (_, 0, true) => Finding::ok(CHECK, format!("{file} is root's, and systemd hands it over")),
        (Some(daemon), user, _) if user == daemon => {
            Finding::ok(CHECK, format!("{file} is {DAEMON}'s alone"))
        }
        (None, ..) => Finding::ok(CHECK, format!("{file} is its owner's alone")),
        _ => Finding::missing(CHECK, format!("the daemon's user, {DAEMON}, may not read {file}"), mend),
    }
}

/// Judges what stands in the file of this host's certificate, which may hold those that lead to the authority.
fn certificate(all: &[Description], name: &Label, now: i64) -> Finding {
    const CHECK: &str = "certificate";
    let renew = format!(
        "memlanectl keys issue {name} --out DIR, bring the files here, and systemctl reload memlaned"
    );
    let Some(own) = all.iter().find(|one| !one.authority) else {
        return Finding::missing(CHECK, "the file has no certificate of a host", renew);
    };
    if all.iter().all(|one| one.signed_by_ca == Some(false)) {
        let found = format!("no certificate in the ca.pem beside {} has signed it", own.file.display());
        return Finding::missing(
            CHECK,
            found,
            "put the ca.pem there that the certificate was issued with, or issue a new one",
        );
    }
    let days = |seconds: i64| (seconds + 12 * 3600) / (24 * 3600);
    match own.valid_until_seconds - now {
        _ if own.valid_from_seconds > now => {
            Finding::missing(CHECK, "it is not valid yet: is the clock of this host right?", "timedatectl")
        }
        left if left <= 0 => Finding::missing(CHECK, "it has expired, and peers refuse it", renew),
        left if left < SOON => Finding::advice(CHECK, format!("it expires in {} days", days(left)), renew),
        left => {
            Finding::ok(CHECK, format!("of {}, valid for {} more days", own.hosts.join(", "), days(left)))
        }
    }
}

fn first_absent(files: &KeyFiles) -> Option<String> {
    let absent =
        |file: &&Path| file.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let all = [files.certificate.as_path(), &files.key, &files.ca];
    all.into_iter().find(absent).map(|file| file.display().to_string())
}

fn is_denied(files: &KeyFiles) -> bool {
    let denied =
        |file: &Path| File::open(file).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    !is_root() && (denied(&files.certificate) || denied(&files.key) || denied(&files.ca))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::Status;
    use super::*;
    use memlane_keys::{Authority, CA, CERTIFICATE, KEY, Validity};
    use memlaned::config::Config;

    fn issued(directory: &Path, host: &str) -> PathBuf {
        let out = directory.join(host);
        Authority::new("test").unwrap().issue_to(&out, host, Validity::days(30)).unwrap();
        out
    }

    fn files(directory: &Path) -> KeyFiles {
        let file = |name: &str| directory.join(name);
        KeyFiles { certificate: file(CERTIFICATE), key: file(KEY), ca: file(CA) }
    }

    #[test]
    fn keys_are_there_or_what_is_wrong_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let name: Label = "host-a".parse().unwrap();
        let judge = |directory: &Path| {
            let files = files(directory);
            let text = format!(
                "host = \"host-a\"\n[keys]\ncertificate = {:?}\nkey = {:?}\nca = {:?}",
                files.certificate, files.key, files.ca
            );
            let refused = Config::parse("test".as_ref(), &text).unwrap().credentials().err();
            let refused = refused.map(|error| Refused {
                absent: first_absent(&files),
                denied: is_denied(&files),
                why: error.to_string(),
            });
            keys(&files, &name, refused, false)
        };
        let absent = judge(directory.path());
        assert!(absent.status == Status::Missing && absent.remedy.unwrap().contains("keys issue host-a"));
        assert_eq!(judge(&issued(directory.path(), "host-a")).status, Status::Ok);
        let other = judge(&issued(directory.path(), "host-b"));
        assert!(other.status == Status::Missing && other.found.contains("host-b"), "{other:?}");
        let denied = Refused { absent: None, denied: true, why: String::new() };
        assert_eq!(keys(&files(directory.path()), &name, Some(denied), false).status, Status::Advice);
        let elsewhere = Refused { absent: Some("host.key".into()), denied: false, why: String::new() };
        assert_eq!(keys(&files(directory.path()), &name, Some(elsewhere), true).status, Status::Advice);
    }

    #[test]
    fn the_key_is_the_daemons_alone_or_not() {
        let judge = |user, mode, daemon, handed_over| {
            key_owner("host.key".as_ref(), Some(Owner { user, group: 0, mode }), daemon, handed_over).status
        };
        assert_eq!(judge(990, 0o600, Some(990), false), Status::Ok);
        assert_eq!(judge(0, 0o600, Some(990), true), Status::Ok);
        assert_eq!(judge(0, 0o600, None, false), Status::Ok);
        assert_eq!(judge(0, 0o600, Some(990), false), Status::Missing);
        assert_eq!(judge(990, 0o640, Some(990), false), Status::Missing);
        assert_eq!(key_owner("host.key".as_ref(), None, Some(990), false).status, Status::Advice);
    }

    #[test]
    fn the_certificate_is_valid_and_signed_or_not() {
        let directory = tempfile::tempdir().unwrap();
        let name: Label = "host-a".parse().unwrap();
        let made = issued(directory.path(), "host-a");
        let all = describe(&made.join(CERTIFICATE)).unwrap();
        let end = all[0].valid_until_seconds;
        let status = |now| certificate(&all, &name, now).status;
        assert_eq!(status(end - SOON - 1), Status::Ok);
        assert_eq!(status(end - SOON + 1), Status::Advice);
        assert_eq!(status(end), Status::Missing);
        assert_eq!(status(all[0].valid_from_seconds - 1), Status::Missing);
        let other = issued(directory.path(), "host-b");
        std::fs::copy(other.join(CA), made.join(CA)).unwrap();
        let foreign = certificate(&describe(&made.join(CERTIFICATE)).unwrap(), &name, end - SOON - 1);
        assert!(foreign.status == Status::Missing && foreign.found.contains("has signed it"), "{foreign:?}");
        let authority = describe(&made.join(CA)).unwrap();
        assert_eq!(certificate(&authority, &name, end - SOON - 1).status, Status::Missing);
    }
}
