"""One module an op: public function, `OpDef`, and the rules of the op."""
