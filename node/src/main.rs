//! `weft`: see the library.

fn main() -> std::process::ExitCode {
    weft_node::main()
}
