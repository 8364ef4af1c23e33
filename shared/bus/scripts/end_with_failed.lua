-- Send a failure to the gateways of a request, end its entry and delete its record, journal and log-probabilities.
-- KEYS: stream, record, quarantine, journal, logprobs
-- ARGV: consumer group, consumer, entry id, v, m, prefix of deltas, first gateway, length of deltas, length of the
-- quarantine, attempts, reason (empty: the entry is not quarantined)
-- Returns 1 if the consumer owned the entry.
-- requires: entries
-- requires: deliver
if not owns(ARGV[3]) then return 0 end
for gateway in string.gmatch(is_a('hash', KEYS[2]) and redis.call('HGET', KEYS[2], 'gateways') or ARGV[7], '%S+') do
  deliver(ARGV[6] .. gateway, ARGV[8], ARGV[4], ARGV[5])
end
if ARGV[11] ~= '' then quarantine(ARGV[3], KEYS[3], ARGV[9], ARGV[11], ARGV[10]) end
ack(ARGV[3])
redis.call('UNLINK', KEYS[2], KEYS[4], KEYS[5])
return 1
