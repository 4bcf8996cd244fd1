//! Replays the files of `fuzz/corpus/`, as far as they go: each must hold what its target demands.
//!
//! Some of them are seeds: valid messages of every kind, made here from the code that the daemons send them with, so that
//! a change of a format cannot leave the corpora behind. The others are what libFuzzer has found, and what once did not hold.

mod seeds;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use memlane_fuzz_targets::TARGETS;

/// Set in the environment, this makes the test write the seeds.
const WRITE: &str = "MEMLANE_WRITE_CORPUS";
/// The corpora are small, so that each test run affords all of them.
const MAX_FILES: usize = 60;
const MAX_FILE_BYTES: u64 = 8 << 10;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn corpus(target: &str) -> PathBuf {
    fuzz().join("corpus").join(target)
}

/// The names in a folder.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_file_of_every_corpus_holds() {
    for (target, run) in TARGETS {
        let folder = corpus(target);
        let files = names(&folder);
        assert!(!files.is_empty(), "{target}: there is no corpus");
        assert!(files.len() <= MAX_FILES, "{target}: {} files are too many", files.len());
        for file in files {
            let path = folder.join(&file);
            let bytes = fs::read(&path).unwrap();
            assert!(bytes.len() as u64 <= MAX_FILE_BYTES, "{}: too large", path.display());
            let held = catch_unwind(AssertUnwindSafe(|| run(&bytes)));
            assert!(held.is_ok(), "fuzz/corpus/{target}/{file} does not hold; the panic above says why");
        }
    }
}

/// `MEMLANE_WRITE_CORPUS=1 cargo test -p memlane-fuzz-targets` writes the seeds anew.
#[test]
fn the_committed_seeds_are_what_is_sent() {
    let made = seeds::all();
    assert_eq!(made.keys().copied().collect::<BTreeSet<_>>(), TARGETS.map(|(name, _)| name).into());
    for (target, seeds) in made {
        let folder = corpus(target);
        if std::env::var_os(WRITE).is_some() {
            fs::create_dir_all(&folder).unwrap();
            for old in names(&folder).iter().filter(|name| name.starts_with(seeds::PREFIX)) {
                fs::remove_file(folder.join(old)).unwrap();
            }
            seeds.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).unwrap());
        }
        let committed = names(&folder).into_iter().filter(|name| name.starts_with(seeds::PREFIX));
        let same = committed.eq(seeds.keys().cloned())
            && seeds.iter().all(|(name, bytes)| fs::read(folder.join(name)).unwrap() == *bytes);
        assert!(
            same,
            "the seeds in fuzz/corpus/{target} are out of date; write them anew with \
             {WRITE}=1 cargo test -p memlane-fuzz-targets"
        );
    }
}

/// cargo-fuzz builds a program for each target, and no other.
#[test]
fn each_target_has_its_program() {
    let targets = BTreeSet::from(TARGETS.map(|(name, _)| name.to_owned()));
    let programs = names(&fuzz().join("fuzz_targets"));
    assert_eq!(programs, targets.iter().map(|name| format!("{name}.rs")).collect());
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for target in &targets {
        assert!(manifest.contains(&format!("name = \"{target}\"")), "fuzz/Cargo.toml has no {target}");
        let program = fs::read_to_string(fuzz().join(format!("fuzz_targets/{target}.rs"))).unwrap();
        assert!(program.contains(&format!("memlane_fuzz_targets::{target}(")), "{program}");
    }
    assert_eq!(names(&fuzz().join("corpus")), targets);
}
