"""The bus of a run: messages, codec, transport, ledger, staleness gate, leases, broker."""
