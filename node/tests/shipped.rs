//! What the program that is shipped must not contain.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::process::Command;

/// The word that `weft_proto::deliberate` leaves in every program with its switch.
const MARK: &[u8] = b"weft-deliberate-bugs-are-compiled-in";

#[test]
fn the_program_has_no_switch_for_deliberate_bugs() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_weft")).unwrap();
    assert!(program.len() > 1 << 20, "a whole program");
    assert!(!program.windows(MARK.len()).any(|window| window == MARK));
}

#[test]
fn nothing_that_the_program_is_built_from_enables_the_switch() {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--locked",
            "-e",
            "features",
            "-p",
            "weft-node",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let features = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    assert!(
        features.contains("weft-proto feature \"grpc\""),
        "features are listed"
    );
    assert!(!features.contains("deliberate-bugs"));
}
