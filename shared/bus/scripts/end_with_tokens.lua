-- Send the last message of a request to its tokens stream, end its entry, and note in its record that this was all.
-- KEYS: stream, tokens, quarantine, record
-- ARGV: consumer group, consumer, entry id, v, m, length of the quarantine, attempts, reason (empty: not quarantined)
-- Returns 1 if the consumer owned the entry.
-- requires: entries
-- requires: typed
if not owns(ARGV[3]) then return 0 end
redis.call('XADD', KEYS[2], '*', 'v', ARGV[4], 'm', ARGV[5])
if ARGV[8] ~= '' then quarantine(ARGV[3], KEYS[3], ARGV[6], ARGV[8], ARGV[7]) end
ack(ARGV[3])
if is_a('hash', KEYS[4]) then redis.call('HSET', KEYS[4], 'over', '1') end
return 1
