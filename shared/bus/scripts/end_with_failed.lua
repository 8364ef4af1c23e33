-- Send a failure to the gateways of a request, end its entry and delete its record, journal and log-probabilities.
-- KEYS: stream, record, quarantine, journal, logprobs
-- ARGV: consumer group, consumer, entry id, v, m, prefix of deltas, first gateway, length of deltas, length of the
-- quarantine, attempts, reason (empty: the entry is not quarantined)
-- Returns 1 if the consumer owned the entry.
-- requires: entries
if not owns(ARGV[3]) then return 0 end
for gateway in string.gmatch(redis.call('HGET', KEYS[2], 'gateways') or ARGV[7], '%S+') do
  redis.call('XADD', ARGV[6] .. gateway, 'NOMKSTREAM', 'MAXLEN', '~', ARGV[8], '*', 'v', ARGV[4], 'm', ARGV[5])
end
if ARGV[11] ~= '' then quarantine(ARGV[3], KEYS[3], ARGV[9], ARGV[11], ARGV[10]) end
ack(ARGV[3])
redis.call('UNLINK', KEYS[2], KEYS[4], KEYS[5])
return 1
