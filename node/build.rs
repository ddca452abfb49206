//! Bakes in which commit the program is built from, for reports: what the working tree says when the program runs may
//! be something else by then. Outside of a repository, or without git, that is `unknown` and nothing fails.

use std::path::Path;
use std::process::Command;

/// Whatever the program is made of, seen from this crate's folder.
const SOURCES: [&str; 10] = [
    "../Cargo.lock",
    "../proto/src",
    "../block/src",
    "../erasure/src",
    "../placement/src",
    "../metadata/src",
    "../target/src",
    "../initiator/src",
    "../volume/src",
    "src",
];

fn main() {
    println!(
        "cargo::rustc-env=WEFT_COMMIT={}",
        commit().unwrap_or_else(|| "unknown".to_owned())
    );
    SOURCES.iter().for_each(|path| watch(path));
    // A commit or a checkout changes these.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]) {
            watch(&path);
        }
    }
}

fn watch(path: &str) {
    // A path that does not exist would make Cargo run this every time.
    if Path::new(path).exists() {
        println!("cargo::rerun-if-changed={path}");
    }
}

fn commit() -> Option<String> {
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let status = ["--no-optional-locks", "status", "--porcelain", "--"];
    let clean = git(&[&status, &SOURCES[..]].concat())?.is_empty();
    Some(if clean { commit } else { format!("{commit}-dirty") })
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
